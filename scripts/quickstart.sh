#!/usr/bin/env bash
# The main job on a bare machine with Rust: weights if there are none, a release build, an
# instrumented generation, its audit.   scripts/quickstart.sh ["prompt" [flags of generate …]]
set -euo pipefail
cd "$(dirname "$0")/.."

prompt=${1:-Write a Rust function that reverses a string.}
shift $(($# > 0 ? 1 : 0))
# Weights of your own in ./weights are left alone.
compgen -G 'weights/*.gguf' >/dev/null || compgen -G 'weights/*.safetensors' >/dev/null ||
    scripts/fetch-weights.sh weights
cargo build --release
exec target/release/flopaudit generate "$prompt" "$@"
