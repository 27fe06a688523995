#!/usr/bin/env bash
# Lints the code for CUDA without a toolkit, a driver or a GPU: a stub takes nvcc's place.
#
# The folder is its own, so that no build ever meets the stub's empty kernels. The hub's client is
# left out and dependencies are not optimized: they would take most of the time. The profile is the
# tests', whose own code is linted too.
set -euo pipefail
cd "$(dirname "$0")/.."

stub=$PWD/scripts/cuda/stub-nvcc
export PATH=$stub:$PATH NVCC=$stub/nvcc CUDA_COMPUTE_CAP=90 CUDARC_CUDA_VERSION=13000

exec cargo --config 'profile.dev.package."*".opt-level=0' clippy --no-default-features \
    --features cuda --profile test --lib --bins --test cuda --target-dir target/check-cuda -- -D warnings
