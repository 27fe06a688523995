#!/usr/bin/env bash
# Runs the CUDA build with CUDA's libraries found: scripts/cuda/run.sh ARGUMENTS-OF-FLOPAUDIT…
#
# The binary is dist/flopaudit-cuda, or lies beside this script; an .xz of it is unpacked first.
# A library that the system does not find is looked for in the driver's usual places, in a CUDA
# toolkit, and in the wheels of a Python (PYTHON names one): whichever has PyTorch has them.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

die() { printf 'run: %s\n' "$*" >&2; exit 2; }

# The binary, unpacked where its .xz is newer.
find_binary() {
    local folder
    for folder in "$here/../../dist" "$here"; do
        binary="$folder/flopaudit-cuda"
        if [ -f "$binary.xz" ] && ! [ "$binary" -nt "$binary.xz" ]; then
            unpack "$binary.xz" "$binary"
        fi
        [ -f "$binary" ] && return
    done
    die "no flopaudit-cuda or flopaudit-cuda.xz in dist or $here; scripts/build-cuda.sh makes them"
}

unpack() {
    local new="$2.new.$$"
    [ -w "$(dirname "$2")" ] || die "$1: its folder cannot be written, so it cannot be unpacked there"
    if command -v xz >/dev/null; then
        xz --decompress --stdout "$1" >"$new" 2>/dev/null
    elif command -v python3 >/dev/null; then
        python3 -c 'import lzma, shutil, sys
with lzma.open(sys.argv[1]) as packed, open(sys.argv[2], "wb") as out:
    shutil.copyfileobj(packed, out)' "$1" "$new" 2>/dev/null
    else
        die "$1: neither xz nor python3 is there to unpack it"
    fi || { rm -f "$new"; die "$1: is damaged, or the disk is full"; }
    # Newer than its .xz from now on.
    chmod +x "$new" && mv "$new" "$2" || die "$2: cannot be written"
}

# Folders that may hold a library, the driver's first: a toolkit's libcuda.so.1 may be another's.
folders() {
    local each
    printf '%s\n' /usr/local/nvidia/lib64 /usr/lib/wsl/lib /run/opengl-driver/lib \
        "/usr/lib/$(uname -m)-linux-gnu" /usr/lib64
    for each in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda /opt/cuda; do
        [ -n "$each" ] && printf '%s\n' "$each/lib64" "$each/lib"
    done
    if each="$(command -v nvcc)"; then
        printf '%s\n' "$(dirname "$(dirname "$(readlink -f "$each")")")/lib64"
    fi
    for each in "${PYTHON:-}" python3 python; do
        [ -n "$each" ] && command -v "$each" >/dev/null && "$each" -c '
import glob, site, sys
for folder in dict.fromkeys([*sys.path, *site.getsitepackages(), site.getusersitepackages()]):
    print(*glob.glob(glob.escape(folder) + "/nvidia/*/lib"), sep="\n")' 2>/dev/null
    done
    return 0
}

# What the loader does not find, a name a line; nothing where the binary can start.
lacking() { sed -n 's/^[[:space:]]*\([^ ]*\) => not found.*/\1/p' <<<"$1"; }

# What the loader would load. Its complaints come along.
loader() { LD_LIBRARY_PATH="$path" LD_TRACE_LOADED_OBJECTS=1 "$binary" 2>&1 || true; }

find_libraries() {
    local trace name folder found
    local -a candidates
    mapfile -t candidates < <(folders)
    trace="$(loader)"
    # A library that is found may need others.
    while name="$(lacking "$trace" | head -n 1)" && [ -n "$name" ]; do
        found=''
        for folder in "${candidates[@]}"; do
            [ -e "$folder/$name" ] && { found="$folder"; break; }
        done
        # A folder that is in the path already was of no use to the loader.
        [[ -z "$found" || ":$path:" == *":$found:"* ]] && die "$(how_to_get "$name")"
        path="${path:+$path:}$found"
        trace="$(loader)"
    done
    if [[ "$trace" == *"GLIBC"*"not found"* ]]; then
        die "this machine's C library is older than the one that $binary was built with"
    fi
}

how_to_get() {
    local wheel
    case "$1" in
        libcuda.so.*)
            echo "$1 not found: no NVIDIA driver here (LD_LIBRARY_PATH may name its folder)"; return ;;
        libcublas*) wheel=nvidia-cublas ;;
        libcurand*) wheel=nvidia-curand ;;
        libcudart*) wheel=nvidia-cuda-runtime ;;
        libnvrtc*) wheel=nvidia-cuda-nvrtc ;;
        libnccl*) wheel=nvidia-nccl-cu13 ;;
        libcudnn*) wheel=nvidia-cudnn-cu13 ;;
        *) echo "$1 not found"; return ;;
    esac
    echo "$1 not found: install CUDA 13 or \`pip install $wheel\`, or set LD_LIBRARY_PATH"
}

path="${LD_LIBRARY_PATH:-}"
find_binary
[ -x "$binary" ] || chmod +x "$binary" 2>/dev/null || die "$binary: cannot be executed"
find_libraries
[ -z "$path" ] || export LD_LIBRARY_PATH="$path"
exec "$binary" "$@"
