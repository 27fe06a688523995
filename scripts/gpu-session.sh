#!/usr/bin/env bash
# What a GPU does, measured in one go: scripts/gpu-session.sh [DIR]
#
# Audits and losses against the CPU, then speeds of generation, evaluation and training on weights
# of the true shapes. Each step has a time limit, a log and a JSON report in DIR (default
# gpu-session), and a failing one stops none of the others; DIR/summary.md is the table.
# DEVICE=cpu rehearses it anywhere, PRESET=tiny shortens it; SKIP="name name" leaves steps out.
set -uo pipefail
cd "$(dirname "$0")/.."

out="${1:-gpu-session}"
device="${DEVICE:-cuda}"
preset="${PRESET:-qwen2.5-0.5b}"
model="${MODEL:-synthetic:$preset}"
if [ -z "${FLOPAUDIT:-}" ]; then
    case "$device" in
        cuda*) FLOPAUDIT=scripts/cuda/run.sh ;;
        *) FLOPAUDIT=target/release/flopaudit ;;
    esac
fi
mkdir -p "$out"
: >"$out/steps.tsv"

# step NAME SECONDS ARGUMENTS…: runs flopaudit, at most so long, with its report as NAME.json.
step() {
    local name="$1" limit="$2" start status
    shift 2
    case " ${SKIP:-} " in *" $name "*) return ;; esac
    start=$SECONDS
    timeout "$limit" "$FLOPAUDIT" "$@" --json "$out/$name.json" >"$out/$name.log" 2>&1
    status=$?
    printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - start))" >>"$out/steps.tsv"
    printf '%-28s %s after %s s\n' "$name" "$([ $status = 0 ] && echo ok || echo "FAILED ($status)")" \
        "$((SECONDS - start))"
    [ $status = 0 ] || tail -n 2 "$out/$name.log"
}

on=(--device "$device")
tiny=(--model synthetic:tiny:1 --lora-rank 4 --lora-targets q_proj,v_proj,down_proj)
for dtype in f32 bf16; do
    step "audit-forward-$dtype" 60 audit forward "${tiny[@]}" "${on[@]}" --dtype $dtype --seq 32 --batch 2
    step "audit-generate-$dtype" 60 audit generate "${tiny[@]}" "${on[@]}" --dtype $dtype \
        --prompt-tokens 16 --new-tokens 8 --batch 2 --temperature 0.8 --top-k 5
    step "audit-train-$dtype" 60 audit train "${tiny[@]}" "${on[@]}" --dtype $dtype --seq 300 --batch 2 \
        --steps 2 --accumulate 2 --recompute
    step "audit-full-$dtype" 60 audit train "${tiny[@]}" "${on[@]}" --dtype $dtype --seq 32 --full --steps 2
done

# The same training and the same evaluation on both sides, in f32.
data=(--data examples/overfit.txt --seq 64 --batch 2)
rm -rf "$out"/run-*
for side in cpu "$device"; do
    name="train-tiny-${side%%:*}"
    step "$name" 90 train --model synthetic:tiny:1 "${data[@]}" --device "$side" --dtype f32 --steps 20 \
        --lr 0.01 --lora-rank 4 --out "$out/run-$name"
    step "eval-${side%%:*}" 90 eval --model "$model" "${data[@]}" --device "$side" --dtype f32
done

# Speeds, in bf16.
fast=(--model "$model" "${on[@]}" --dtype bf16)
for batch in 1 8 64; do
    step "decode-b$batch" 90 generate "Once upon a time" --raw "${fast[@]}" --batch $batch \
        --max-new-tokens 128 --ignore-eos
done
for seq in 512 2048; do
    step "prefill-$seq" 90 eval "${fast[@]}" --data examples/alice-eval.txt --seq $seq --batch 4
    step "lora-$seq" 90 train "${fast[@]}" --data examples/alice.txt --seq $seq --batch $((8192 / seq)) \
        --steps 12 --lora-rank 8 --out "$out/run-lora-$seq"
done
step full-512 120 train "${fast[@]}" --data examples/alice.txt --seq 512 --batch 8 --steps 8 --full \
    --lr 1e-5 --out "$out/run-full-512"
rm -rf "$out"/run-*

python3 scripts/cuda/summary.py "$out" | tee "$out/summary.md"
