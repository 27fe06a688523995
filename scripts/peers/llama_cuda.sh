#!/usr/bin/env bash
# Builds llama.cpp's llama-bench for this machine's GPU: target/llama/llama-bench.
#
#   scripts/peers/llama_cuda.sh             builds it
#   scripts/peers/llama_cuda.sh pack FILE   what the build needs of the sources, 5 MB to carry
#
# The sources are those in the sdist of PyPI's llama-cpp-python, pinned by version and hash. The build
# needs nvcc, a C++ compiler and cmake (which comes from PyPI where there is none). Status 77: there is
# no nvcc, so nothing can be built here. From the environment:
#   LLAMA_SDIST       the sdist [fetched from PyPI]
#   LLAMA_SOURCE      what `pack` made elsewhere, in place of the sdist
#   GGML_CUDA         OFF builds for the CPU [ON]
#   CUDA_COMPUTE_CAP  the GPU's compute capability [that of this machine's GPU, else 90: Hopper]
#   JOBS              compilers at a time [one a core]
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly VERSION=0.3.36
readonly SHA256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
readonly CMAKE_VERSION=4.4.4
readonly HERE="$PWD/target/llama"
# What is left out is most of it: documents, vocabularies, the server and its pages.
readonly NEEDED=(CMakeLists.txt LICENSE cmake common ggml gguf-py include licenses src tools vendor)
readonly LEFT_OUT=(--exclude=tools/ui --exclude=tools/server)

die() { printf 'llama_cuda: %s\n' "$*" >&2; exit 1; }

# The sdist's path, as $sdist.
find_sdist() {
    sdist="${LLAMA_SDIST:-$HERE/llama_cpp_python-$VERSION.tar.gz}"
    if [ -z "${LLAMA_SDIST:-}" ] && [ ! -f "$sdist" ]; then
        mkdir -p "$HERE"
        # No binary of it alone: with `:all:` pip would also build the packages that read its metadata.
        python3 -m pip download --quiet --disable-pip-version-check --no-deps \
            --no-binary llama-cpp-python --dest "$HERE" "llama-cpp-python==$VERSION" ||
            die "llama-cpp-python $VERSION cannot be fetched from PyPI; LLAMA_SDIST or LLAMA_SOURCE names a copy"
    fi
    [ -f "$sdist" ] || die "LLAMA_SDIST: $sdist is not there"
    echo "$SHA256  $sdist" | sha256sum --check --status ||
        die "$sdist: not the sdist of llama-cpp-python $VERSION (its SHA-256 differs)"
}

# The sources in $HERE/source, unless they are there.
unpack() {
    [ -f "$HERE/source/CMakeLists.txt" ] && return
    local new="$HERE/source.new"
    rm -rf "$new"
    mkdir -p "$new"
    if [ -n "${LLAMA_SOURCE:-}" ]; then
        tar -xf "$LLAMA_SOURCE" -C "$new" || die "LLAMA_SOURCE: $LLAMA_SOURCE cannot be unpacked"
    else
        find_sdist
        local root="llama_cpp_python-$VERSION/vendor/llama.cpp"
        tar -xf "$sdist" -C "$new" --strip-components=3 "${NEEDED[@]/#/$root/}" || die "$sdist: cannot be unpacked"
    fi
    rm -rf "$HERE/source"
    mv "$new" "$HERE/source"
}

pack() {
    unpack
    tar -cJf "$1" -C "$HERE/source" "${LEFT_OUT[@]}" "${NEEDED[@]}" || die "$1: cannot be written"
    printf '%s: %s\n' "$1" "$(du -h "$1" | cut -f 1)"
}

find_nvcc() {
    local folder
    for folder in "${CUDA_HOME:+$CUDA_HOME/bin}" "$(dirname "$(command -v nvcc || echo /none/nvcc)")" \
        /usr/local/cuda/bin /opt/cuda/bin; do
        if [ -x "$folder/nvcc" ]; then
            nvcc="$folder/nvcc"
            return
        fi
    done
    echo "llama_cuda: no nvcc in CUDA_HOME, PATH or /usr/local/cuda: llama.cpp is not built" >&2
    exit 77
}

compute_capability() {
    local found
    found="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)" || true
    found="${found//./}"
    [[ "$found" =~ ^[0-9]+$ ]] || found=90
    echo "$found"
}

find_cmake() {
    cmake="$(command -v cmake)" && return
    cmake="$HERE/cmake/bin/cmake"
    [ -x "$cmake" ] && return
    python3 -m venv "$HERE/cmake" || die "$HERE/cmake: cannot be made"
    "$HERE/cmake/bin/python" -m pip install --quiet --disable-pip-version-check "cmake==$CMAKE_VERSION" ||
        die "no cmake in PATH, and it cannot be fetched from PyPI"
}

build() {
    local for_gpu=(-DGGML_CUDA=OFF)
    if [ "${GGML_CUDA:-ON}" = ON ]; then
        find_nvcc
        # Machine code for this GPU alone, nothing for others.
        for_gpu=(-DGGML_CUDA=ON "-DCMAKE_CUDA_COMPILER=$nvcc" -DGGML_CUDA_NCCL=OFF
            "-DCMAKE_CUDA_ARCHITECTURES=${CUDA_COMPUTE_CAP:-$(compute_capability)}-real")
    fi
    find_cmake
    unpack
    "$cmake" -S "$HERE/source" -B "$HERE/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF \
        -DLLAMA_OPENSSL=OFF -DGGML_CCACHE=OFF "${for_gpu[@]}" || die "cmake refuses to configure the build"
    "$cmake" --build "$HERE/build" --target llama-bench --parallel "${JOBS:-$(nproc)}" || die "the build fails"
    cp "$HERE/build/bin/llama-bench" "$HERE/llama-bench"
    printf 'ready: %s\n' target/llama/llama-bench
}

case "${1:-build}" in
    build) build ;;
    pack) pack "${2:?llama_cuda: pack FILE}" ;;
    *) die "\`$1\`: neither build nor pack" ;;
esac
