#!/usr/bin/env bash
# Builds dist/flopaudit-cuda and dist/flopaudit-cuda.xz; scripts/cuda/run.sh runs them.
#
# With a CUDA toolkit (nvcc in PATH or CUDA_HOME) or, where there is none, with one from PyPI's
# wheels, kept in target/cuda-toolkit. Neither a GPU nor a driver is needed. From the environment:
#   FEATURES          cargo features beside the default ones, with commas [cuda]
#   CUDA_COMPUTE_CAP  the GPU's compute capability [that of this machine's GPU, else 90: Hopper]
#   CUDA_TARGET_CPU   the processor that runs it [x86-64-v3; native for this machine's alone]
set -euo pipefail
cd "$(dirname "$0")/.."

readonly FEATURES="${FEATURES:-cuda}"
readonly WHEELS=scripts/cuda/wheels.txt
readonly FETCHED="$PWD/target/cuda-toolkit"
readonly STUBS="$PWD/target/cuda-stubs"
readonly TARGET="$PWD/target/cuda"

say() { printf '%s\n' "$*"; }
die() { printf 'build-cuda: %s\n' "$*" >&2; exit 1; }

need() {
    local tool
    for tool in "$@"; do
        command -v "$tool" >/dev/null || die "$tool is not installed"
    done
}

# The toolkit of wheels.txt, unpacked. A stamp that equals wheels.txt says that it is whole.
fetch_toolkit() {
    [ "$(uname -sm)" = "Linux x86_64" ] ||
        die "no nvcc in PATH or CUDA_HOME, and the wheels are for x86-64 Linux alone"
    if ! cmp -s "$WHEELS" "$FETCHED/wheels.txt"; then
        say "no nvcc in PATH or CUDA_HOME: fetching CUDA's compiler from PyPI (100 MB)"
        mkdir -p "$FETCHED/wheels"
        # Wheels that are there already, and whole, are not fetched again.
        python3 -m pip download --quiet --disable-pip-version-check --no-deps \
            --only-binary :all: --require-hashes --requirement "$WHEELS" \
            --dest "$FETCHED/wheels" ||
            die "CUDA's compiler cannot be fetched from PyPI; run again, or install a toolkit"
        rm -rf "$FETCHED/nvidia"
        local wheel
        for wheel in "$FETCHED"/wheels/*.whl; do
            python3 -m zipfile -e "$wheel" "$FETCHED" || die "$wheel: cannot be unpacked"
        done
        local root="$FETCHED/nvidia/cu13"
        chmod -R u+x "$root/bin" "$root/nvvm/bin"
        ln -sfn lib "$root/lib64"
        ln -sfn libcudart.so.13 "$root/lib/libcudart.so"
        cp "$WHEELS" "$FETCHED/wheels.txt"
    fi
    CUDA_HOME="$FETCHED/nvidia/cu13"
}

find_toolkit() {
    if [ -n "${CUDA_HOME:-}" ]; then
        [ -x "$CUDA_HOME/bin/nvcc" ] || die "CUDA_HOME: $CUDA_HOME/bin/nvcc is not there"
    elif command -v nvcc >/dev/null; then
        CUDA_HOME="$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")"
    else
        fetch_toolkit
    fi
    export CUDA_HOME PATH="$CUDA_HOME/bin:$PATH"
    local version
    version="$(nvcc --version)" || die "$CUDA_HOME/bin/nvcc does not run"
    version="$(sed -n 's/.*release \([0-9.]*\),.*/\1/p' <<<"$version")"
    [[ "$version" =~ ^[0-9]+\.[0-9]+$ ]] || die "$CUDA_HOME/bin/nvcc: of which CUDA it is, it does not say"
    cuda_major="${version%.*}"
    # As cudarc spells it: 13.0 is 13000.
    export CUDARC_CUDA_VERSION="${cuda_major}0${version#*.}0"
    say "CUDA $version: $CUDA_HOME"
}

# Libraries that the linker will ask for and this machine lacks; above all the driver's.
make_stubs() {
    local name wanted=(cuda cublas cublasLt curand nvrtc) missing=() cudarc
    [[ ",$FEATURES," == *,nccl,* ]] && wanted+=(nccl)
    [[ ",$FEATURES," == *,cudnn,* ]] && wanted+=(cudnn)
    for name in "${wanted[@]}"; do
        on_this_machine "$name" || missing+=("$name")
    done
    rm -rf "$STUBS"
    [ ${#missing[@]} -gt 0 ] || return 0
    local metadata
    metadata="$(cargo metadata --locked --format-version 1 --features "$FEATURES")" ||
        die "FEATURES: cargo does not take '$FEATURES'"
    cudarc="$(python3 -c '
import json, os, sys
packages = json.load(sys.stdin)["packages"]
print(*(os.path.dirname(p["manifest_path"]) for p in packages if p["name"] == "cudarc"))' <<<"$metadata")"
    [ -d "$cudarc" ] || die "features $FEATURES: no CUDA among them"
    python3 scripts/cuda/mkstubs.py --cudarc "$cudarc" --cuda "$cuda_major" --out "$STUBS" \
        "${missing[@]}" || die "the stubs of ${missing[*]} cannot be made"
    export LIBRARY_PATH="$STUBS${LIBRARY_PATH:+:$LIBRARY_PATH}"
}

on_this_machine() {
    local folder
    for folder in lib64 lib64/stubs lib lib/stubs targets/x86_64-linux/lib{,/stubs}; do
        [ -e "$CUDA_HOME/$folder/lib$1.so" ] && return 0
    done
    return 1
}

compute_capability() {
    local found
    found="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)" || true
    found="${found//./}"
    [[ "$found" =~ ^[0-9]+$ ]] || found=90
    echo "$found"
}

main() {
    need cargo python3 xz c++
    find_toolkit
    make_stubs
    export CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-$(compute_capability)}"
    # In place of the repository's target-cpu=native: this binary may run on another machine.
    if [ "$(uname -m)" = x86_64 ]; then
        export RUSTFLAGS="${RUSTFLAGS:-} -C target-cpu=${CUDA_TARGET_CPU:-x86-64-v3}"
    fi
    # The toolkit's own runtime library, where it is not in the linker's path.
    export LIBRARY_PATH="${LIBRARY_PATH:+$LIBRARY_PATH:}$CUDA_HOME/lib64"
    export CUDAFORGE_THREADS="${CUDAFORGE_THREADS:-$(nproc)}"
    say "features $FEATURES, compute capability $CUDA_COMPUTE_CAP"
    cargo build --locked --release --features "$FEATURES" --bin flopaudit --target-dir "$TARGET"

    mkdir -p dist
    cp "$TARGET/release/flopaudit" dist/flopaudit-cuda.new
    mv dist/flopaudit-cuda.new dist/flopaudit-cuda
    xz --force --keep -9 dist/flopaudit-cuda
    # Newer than its .xz, so that run.sh need not unpack it.
    touch dist/flopaudit-cuda
    local file
    for file in dist/flopaudit-cuda dist/flopaudit-cuda.xz; do
        say "$file: $(du -h "$file" | cut -f 1)"
    done
}

main
