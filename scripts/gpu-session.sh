#!/usr/bin/env bash
# What a GPU does, checked and measured in one go: scripts/gpu-session.sh [DIR]
#
# Kernels against their CPU twins, audits, losses and tokens against the CPU; ceilings; decoding,
# prefill and training; witnesses: cuBLAS's log, Nsight Compute's counters; peers: PyTorch and
# llama.cpp; the kernels' tests under compute-sanitizer. Each step has a time limit, a log and a JSON
# report in DIR (default gpu-session), and a failing one stops none of the others; DIR/summary.md is
# the table. From the environment:
#   DEVICE, PRESET    cuda[:N] and qwen2.5-0.5b; cpu and tiny rehearse it anywhere
#   MODEL             weights in place of random ones of PRESET's shapes
#   FLOPAUDIT         the program [scripts/cuda/run.sh, on the CPU target/release/flopaudit]
#   KERNEL_TESTS      the built tests/cuda.rs, where there is one
#   LIB_TESTS         the built unit tests of the library, likewise
#   PYTHON            one with PyTorch [python3]
#   LLAMA_BENCH       llama.cpp's [target/llama/llama-bench, which scripts/peers/llama_cuda.sh builds;
#                     here too, where LLAMA_SDIST or LLAMA_SOURCE names what it is built of]
#   SANITIZER_FLAGS   more flags of compute-sanitizer
#   STAGES            of correctness benches witnesses peers sanitizer [all, in this order]
#   SKIP, ONLY        patterns of steps, with spaces: SKIP="torch-* bench-train-*"
#   SECONDS_IN_ALL    after which no step goes on [530]
set -uo pipefail
out="${1:-gpu-session}"
case "$out" in /*) ;; *) out="$PWD/$out" ;; esac
cd "$(dirname "$0")/.."

device="${DEVICE:-cuda}"
preset="${PRESET:-qwen2.5-0.5b}"
model=(--model "${MODEL:-synthetic:$preset}")
python="${PYTHON:-python3}"
limit_in_all="${SECONDS_IN_ALL:-530}"
stages="${STAGES:-correctness benches witnesses peers sanitizer}"
for stage in $stages; do
    case "$stage" in
        correctness | benches | witnesses | peers | sanitizer) ;;
        *) echo "STAGES: no stage \`$stage\`" >&2; exit 2 ;;
    esac
done
on_gpu=false
case "$device" in cuda*) on_gpu=true ;; esac
if [ -z "${FLOPAUDIT:-}" ]; then
    if $on_gpu; then FLOPAUDIT=scripts/cuda/run.sh; else FLOPAUDIT=target/release/flopaudit; fi
fi
mkdir -p "$out"
# The ceiling that is measured here is the one that counts, and no other run's.
export XDG_CACHE_HOME="$out/cache"
: >"$out/steps.tsv"

matches() { # NAME PATTERN…
    local name="$1" pattern
    shift
    # shellcheck disable=SC2254 — the patterns are patterns
    for pattern in "$@"; do case "$name" in $pattern) return 0 ;; esac; done
    return 1
}

# timed NAME SECONDS COMMAND…: runs it, at most so long; its output is NAME.log.
timed() {
    local name="$1" limit="$2" start=$SECONDS status=0
    shift 2
    # shellcheck disable=SC2086 — patterns with spaces between
    (set -f; matches "$name" ${SKIP:-}) && return
    # shellcheck disable=SC2086
    [ -z "${ONLY:-}" ] || (set -f; matches "$name" $ONLY) || return
    local left=$((limit_in_all - SECONDS))
    if [ "$left" -le 0 ]; then
        status=late
    else
        # A hung call into the driver hears no polite signal.
        timeout -k 5 "$((limit < left ? limit : left))" "$@" >"$out/$name.log" 2>&1 || status=$?
    fi
    # A script's word that there is nothing here to run it with.
    [ "$status" != 77 ] || status=skipped
    local said
    case "$status" in 0) said=ok ;; skipped) said=skipped ;; *) said="FAILED ($status)" ;; esac
    printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - start))" >>"$out/steps.tsv"
    printf '%4s s  %-26s %s\n' "$SECONDS" "$name" "$said"
    case "$status" in 0 | late) ;; *) tail -n 2 "$out/$name.log" ;; esac
}

# skipped NAME REASON: what cannot run here, and why.
skipped() {
    # shellcheck disable=SC2016 — the inner shell expands it
    timed "$1" 5 bash -c 'echo "$1"; exit 77' skipped "$2"
}

# step NAME SECONDS ARGUMENTS…: flopaudit, with its report as NAME.json.
step() {
    local name="$1" limit="$2"
    shift 2
    timed "$name" "$limit" "$FLOPAUDIT" "$@" --json "$out/$name.json"
}

# found NAME SECONDS ARGUMENTS…: flopaudit, whose audit must not balance.
found() {
    local name="$1" limit="$2"
    shift 2
    # shellcheck disable=SC2016 — the inner shell expands them
    timed "$name" "$limit" bash -c '"$@"; [ $? = 1 ]' found "$FLOPAUDIT" "$@" --json "$out/$name.json"
}

# Sizes of the benches: those of the tiny model where it is rehearsed.
if [ "$preset" = tiny ]; then
    batches=1,2 contexts=8,16 lengths=16,32 few_long=64 many=2 train_seqs="16 32" row_tokens=64
    qwen3_preset=tiny-qwen3 qwen3_contexts=16 few_seq=32 few_short=16
else
    batches=1,8,64 contexts=128,2048,8192 lengths=512,2048,8192 few_long=32736 many=8
    train_seqs="512 2048" row_tokens=8192
    qwen3_preset=qwen3-0.6b qwen3_contexts=128,2048 few_seq=2048 few_short=512
fi

on=(--device "$device")
tiny=(--model synthetic:tiny:1 --lora-rank 4 --lora-targets q_proj,v_proj,down_proj)
tokens=(--prompt-tokens 16 --new-tokens 24)
drawn=(--temperature 0.7 --top-k 20 --top-p 0.8 --repeat-penalty 1.1)

correctness() {
    [ -z "${KERNEL_TESTS:-}" ] || timed kernels 120 "$KERNEL_TESTS" --test-threads 1
    [ -z "${LIB_TESTS:-}" ] || timed kernels-lib 60 "$LIB_TESTS" --test-threads 1 ops::cuda
    local dtype batch side fault rows
    for dtype in f32 bf16; do
        step "audit-forward-$dtype" 60 audit forward "${tiny[@]}" "${on[@]}" --dtype $dtype --seq 32 --batch 2
        for batch in 1 3 9; do
            step "audit-generate-$batch-$dtype" 60 audit generate --model synthetic:tiny:1 "${on[@]}" \
                --dtype $dtype "${tokens[@]}" --batch $batch
        done
        step "audit-sampling-$dtype" 60 audit generate --model synthetic:tiny:1 "${on[@]}" --dtype $dtype \
            "${tokens[@]}" --batch 2 "${drawn[@]}"
        for batch in 1 9; do
            step "audit-adapters-$batch-$dtype" 60 audit generate "${tiny[@]}" "${on[@]}" --dtype $dtype \
                "${tokens[@]}" --batch $batch
        done
        step "audit-train-$dtype" 60 audit train "${tiny[@]}" "${on[@]}" --dtype $dtype --seq 300 --batch 2 \
            --steps 2 --accumulate 2 --recompute
        step "audit-full-$dtype" 60 audit train --model synthetic:tiny:1 "${on[@]}" --dtype $dtype --seq 32 \
            --full --steps 2
        # Prefixes, parts, turns, rounds of verification; prompts and documents of any lengths.
        step "audit-turns-$dtype" 60 audit generate "${tiny[@]}" "${on[@]}" --dtype $dtype "${tokens[@]}" \
            --batch 3 --past 40 --prefill-chunk 7 --then 20+9 --then 1+5
        step "audit-verify-$dtype" 60 audit verify "${tiny[@]}" "${on[@]}" --dtype $dtype --batch 2 --past 33 \
            --drafted 5 --accepted 3 --rounds 4
        # Blocks of scores that the mask hides wholly are left out: past one block, with a past or without.
        step "audit-forward-blocked-$dtype" 60 audit forward "${tiny[@]}" "${on[@]}" --dtype $dtype --seq 200 \
            --batch 2 --attention blocked
        step "audit-train-blocked-$dtype" 60 audit train "${tiny[@]}" "${on[@]}" --dtype $dtype --seq 200 \
            --batch 2 --steps 2 --recompute --attention blocked
        step "audit-full-blocked-$dtype" 60 audit train --model synthetic:tiny:1 "${on[@]}" --dtype $dtype \
            --seq 130 --batch 2 --full --steps 2 --attention blocked
        step "audit-generate-blocked-$dtype" 60 audit generate "${tiny[@]}" "${on[@]}" --dtype $dtype \
            --prompt-tokens 150 --new-tokens 24 --batch 3 --past 40 --prefill-chunk 70 --attention blocked
        step "ragged-$dtype" 60 generate --prompts examples/prompts.txt --raw --ignore-eos \
            --max-new-tokens 24 "${tiny[@]}" "${on[@]}" --dtype $dtype
        step "packed-eval-$dtype" 60 eval --data examples/documents.jsonl --seq 128 --batch 2 --packing \
            --model synthetic:tiny:1 "${on[@]}" --dtype $dtype
    done
    # Products in 8 bits, and moments in two bytes.
    step audit-forward-fp8 60 audit forward "${tiny[@]}" "${on[@]}" --dtype fp8 --seq 32 --batch 2
    step audit-generate-fp8 60 audit generate --model synthetic:tiny:1 "${on[@]}" --dtype fp8 "${tokens[@]}" --batch 3
    step audit-train-fp8 60 audit train "${tiny[@]}" "${on[@]}" --dtype fp8 --seq 200 --batch 2 --steps 2 --recompute
    step audit-full-moments 60 audit train --model synthetic:tiny:1 "${on[@]}" --dtype bf16 --seq 32 --full \
        --steps 2 --moments bf16
    local family
    for family in llama mistral qwen3 gemma3; do
        step "audit-$family" 60 audit generate --model "synthetic:tiny-$family:1" "${on[@]}" --dtype bf16 \
            "${tokens[@]}" --batch 3 --lora-rank 4
        step "audit-train-$family" 60 audit train --model "synthetic:tiny-$family:1" "${on[@]}" --dtype bf16 \
            --seq 64 --batch 2 --steps 1 --lora-rank 4 --recompute
        step "audit-train-blocked-$family" 60 audit train --model "synthetic:tiny-$family:1" "${on[@]}" \
            --dtype bf16 --seq 200 --batch 2 --steps 1 --lora-rank 4 --attention blocked
        step "ragged-$family" 60 generate --prompts examples/prompts.txt --raw --ignore-eos \
            --max-new-tokens 24 --model "synthetic:tiny-$family:1" "${on[@]}" --dtype bf16
    done
    # A kernel dropped from the recorded graph, there twice, or with half of its blocks is found: the
    # products of few rows are ours, those of many cuBLAS's.
    if $on_gpu; then
        for fault in drop:0 drop:7 double:3 halve:1; do
            for rows in "1 bf16" "9 f32" "65 bf16"; do
                read -r batch dtype <<<"$rows"
                found "fault-$fault-$batch-$dtype" 60 audit generate --model synthetic:tiny:1 "${on[@]}" \
                    --dtype "$dtype" "${tokens[@]}" --batch "$batch" --plant-fault "$fault"
            done
        done
    fi
    # The same training, evaluation and text on both sides, in f32.
    local data=(--data examples/overfit.txt --seq 64 --batch 2)
    local text=("A sentence that every side goes on with" --raw --ignore-eos --max-new-tokens 24 --dtype f32)
    rm -rf "$out"/run-*
    for side in $(printf "%s\n" cpu "$device" | sort -u); do
        step "train-tiny-${side%%:*}" 90 train --model synthetic:tiny:1 "${data[@]}" --device "$side" \
            --dtype f32 --steps 20 --lr 0.01 --lora-rank 4 --out "$out/run-${side%%:*}"
        step "train-packed-${side%%:*}" 90 train --model synthetic:tiny:1 --data examples/documents.jsonl \
            --seq 128 --batch 2 --packing --device "$side" --dtype f32 --steps 6 --lr 0.01 --lora-rank 4 \
            --out "$out/run-packed-${side%%:*}"
        step "ragged-${side%%:*}" 90 generate --prompts examples/prompts.txt --raw --ignore-eos \
            --max-new-tokens 24 "${model[@]}" --device "$side" --dtype f32
        step "eval-${side%%:*}" 90 eval "${model[@]}" "${data[@]}" --device "$side" --dtype f32
        step "text-${side%%:*}" 90 generate "${text[@]}" "${model[@]}" --device "$side"
        step "text-qwen3-${side%%:*}" 90 generate "${text[@]}" --model "synthetic:$qwen3_preset" --device "$side"
        step "drawn-${side%%:*}" 90 generate "${text[@]}" "${model[@]}" --device "$side" "${drawn[@]}"
    done
    # Recorded, launch by launch, op by op.
    step text-no-graph 60 generate "${text[@]}" "${model[@]}" "${on[@]}" --no-cuda-graph
    step text-ops 60 generate "${text[@]}" "${model[@]}" "${on[@]}" --op-times
    # The trained weights, where MODEL has them: PyTorch's tokens.
    if [ -f "${MODEL:-}" ]; then
        for dtype in f32 bf16; do
            timed "golden-$dtype" 90 "$python" scripts/witness/golden.py "$FLOPAUDIT" -- --model "$MODEL" \
                "${on[@]}" --dtype $dtype --json "$out/golden-$dtype.json"
        done
    fi
    # In bf16, attention runs in one kernel.
    step eval-bf16 60 eval "${model[@]}" "${data[@]}" "${on[@]}" --dtype bf16
    rm -rf "$out"/run-*
}

benches() {
    local seq attention to=(--ceiling "$out/ceiling.json") fast=("${model[@]}" "${on[@]}" --dtype bf16)
    # 8 bits are a CPU's only to check them: it measures no speed of theirs.
    local rates=bf16
    ! $on_gpu || rates=bf16,fp8
    step ceiling 60 ceiling "${on[@]}" --dtype $rates
    step bench-decode 60 bench decode "${fast[@]}" "${to[@]}" --batch $batches --context $contexts --new-tokens 32
    for attention in dense blocked; do
        local named='' how=("${fast[@]}" "${to[@]}")
        [ $attention = dense ] || named="-$attention" how+=(--attention $attention)
        step "bench-prefill-1$named" 60 bench prefill "${how[@]}" --batch 1 --seq $lengths
        step "bench-prefill-$many$named" 90 bench prefill "${how[@]}" --batch $many --seq $lengths --repetitions 3
        step "bench-prefill-long$named" 60 bench prefill "${how[@]}" --batch 1 --seq $few_long --repetitions 3
        for seq in $train_seqs; do
            step "bench-lora-$seq$named" 60 bench train "${how[@]}" --batch $((row_tokens / seq)) --seq "$seq"
        done
        for seq in $train_seqs; do
            step "bench-full-$seq$named" 60 bench train "${how[@]}" --batch $((row_tokens / 2 / seq)) \
                --seq "$seq" --full
        done
    done
    # Products in 8 bits with their accuracy beside them, and moments in two bytes.
    local blocked=("${fast[@]}" "${to[@]}" --attention blocked)
    if $on_gpu; then
        step bench-prefill-fp8 60 bench prefill "${blocked[@]}" --dtype fp8 --batch $many --seq $few_seq --repetitions 3
        step bench-lora-fp8 60 bench train "${blocked[@]}" --dtype fp8 --batch $((row_tokens / few_short)) --seq $few_short
    fi
    step bench-full-moments 60 bench train "${blocked[@]}" --full --moments bf16 \
        --batch $((row_tokens / 2 / few_short)) --seq $few_short
    # Heads of 128 with norms, through the same kernels.
    local qwen3=(--model "synthetic:${qwen3_preset}" "${on[@]}" --dtype bf16 "${to[@]}")
    step bench-qwen3-decode 60 bench decode "${qwen3[@]}" --batch 1,8 --context $qwen3_contexts --new-tokens 32
    step bench-qwen3-prefill 60 bench prefill "${qwen3[@]}" --batch 2 --seq $few_seq --repetitions 3
    step bench-qwen3-lora 60 bench train "${qwen3[@]}" --batch 2 --seq $few_seq --repetitions 3
    # Whole generations: prefill, choice of tokens and all.
    local once=("Once upon a time" --raw "${fast[@]}" --max-new-tokens 512 --ignore-eos)
    step generate-greedy 60 generate "${once[@]}"
    step generate-no-graph 60 generate "${once[@]}" --no-cuda-graph
    step generate-temperature 60 generate "${once[@]}" --temperature 0.7
    step generate-top-k-top-p 60 generate "${once[@]}" "${drawn[@]}"
    step generate-adapters 60 generate "${once[@]}" --lora-rank 8
}

# logged NAME SECONDS HOW ARGUMENTS…: cuBLAS's log of a run held against its ledger; HOW is an
# option of cublas.py, or nothing.
logged() {
    local name="$1" limit="$2" how="$3"
    shift 3
    CUBLAS_LOGINFO_DBG=1 CUBLAS_LOGDEST_DBG="$out/$name-run.cublas" timed "$name-run" "$limit" "$FLOPAUDIT" \
        audit "$@" "${on[@]}" --ledger "$out/$name.ledger"
    timed "$name" 60 "$python" scripts/witness/cublas.py "$out/$name-run.cublas" "$out/$name.ledger" \
        --json "$out/$name.json" ${how:+"$how"}
}

# counted NAME SECONDS ARGUMENTS…: Nsight Compute's counters of a run held against its ledger.
counted() {
    local name="$1" limit="$2"
    shift 2
    timed "$name-run" "$limit" ncu --target-processes all --clock-control none --csv \
        --metrics "$("$python" scripts/witness/counters.py --metrics)" "$FLOPAUDIT" audit "$@" "${on[@]}" \
        --ledger "$out/$name.ledger"
    timed "$name" 60 "$python" scripts/witness/counters.py "$out/$name-run.log" "$out/$name.ledger" \
        --json "$out/$name.json"
}

witnesses() {
    if $on_gpu; then
        logged cublas-forward 60 "" forward "${model[@]}" --dtype f32 --seq 64 --batch 2
        logged cublas-train 60 --joined train "${model[@]}" --dtype bf16 --seq 128 --batch 2 --steps 1 --lora-rank 8
        logged cublas-generate 60 "" generate "${model[@]}" --dtype bf16 --prompt-tokens 1 --new-tokens 6 --op-times
        if command -v ncu >/dev/null; then
            counted ncu-forward 90 forward "${model[@]}" --dtype bf16 --seq 128 --batch 4
            counted ncu-train 90 train --model synthetic:tiny:1 --dtype bf16 --seq 64 --batch 2 --steps 1 \
                --lora-rank 8
        fi
    else
        timed witness-parsers 60 "$python" scripts/witness/test.py
    fi
}

# PyTorch in the order of what it tells: its fastest ways first, those that launching bounds last.
torch_peers() {
    local part contexts=1x128,8x128,64x128,1x2048
    local parts=(decode-graphed full-masters lora-masters prefill-sdpa full-compiled lora-compiled decode-compiled
        prefill-compiled full-bf16 full-bf16-compiled decode-sdpa lora-sdpa full-sdpa flops decode-eager
        prefill-eager lora-eager)
    local peer=("$python" scripts/witness/torch_peer.py --device "${device%%:*}" --preset "$preset")
    if ! "$python" -c 'import torch, transformers' 2>/dev/null; then
        skipped torch "$python has no torch and transformers"
        return
    fi
    if ! $on_gpu; then
        # A rehearsal starts PyTorch once, and compiles nothing: for a CPU that takes minutes.
        mapfile -t parts < <(printf '%s\n' "${parts[@]}" | grep -v -- -compiled)
        timed torch-all 240 "${peer[@]}" --decode 1x8 --prefill 2x16 --lora 4x16 --full 2x16 --tokens 4 \
            --repetitions 1 --parts "$(IFS=,; echo "${parts[*]}")" --json "$out/torch-all.json"
        return
    fi
    for part in "${parts[@]}"; do
        local limit=60 decode=$contexts
        # Compiling takes PyTorch longer than all the rest. Of decoding, one size.
        case "$part" in *-compiled) limit=150 decode=${contexts%%,*} ;; esac
        timed "torch-$part" $limit "${peer[@]}" --decode $decode --prefill 1x2048,8x2048 --lora 16x512 \
            --full 8x512 --tokens 48 --parts "$part" --json "$out/torch-$part.json"
    done
}

# llama.cpp on weights of the same shapes in BF16, one sequence: prompts, then tokens after each context.
llama_peers() {
    local bench="${LLAMA_BENCH:-target/llama/llama-bench}" weights="target/llama/$preset.gguf"
    local prompts=2048 depths=128,2048 tokens=32
    [ "$preset" = tiny ] && prompts=32 depths=8,16 tokens=4
    if [ ! -x "$bench" ] && [ -n "${LLAMA_SDIST:-}${LLAMA_SOURCE:-}" ]; then
        timed llama-build 420 scripts/peers/llama_cuda.sh
    fi
    if [ ! -x "$bench" ]; then
        skipped llama "no $bench: scripts/peers/llama_cuda.sh builds it, where there is nvcc"
        return
    fi
    mkdir -p target/llama
    timed llama-gguf 90 "$python" scripts/peers/synthetic_gguf.py "$preset" "$weights"
    local run=("$bench" --model "$weights" --n-gpu-layers 99 --flash-attn 1 --repetitions 5 --output json)
    # shellcheck disable=SC2016 — the inner shell expands them
    local into=(bash -c 'out="$1"; shift; "$@" >"$out"' into)
    timed llama-prefill 60 "${into[@]}" "$out/llama-prefill.json" "${run[@]}" --n-prompt $prompts --n-gen 0 \
        --ubatch-size 512,2048
    timed llama-decode 60 "${into[@]}" "$out/llama-decode.json" "${run[@]}" --n-prompt 0 --n-gen $tokens \
        --n-depth $depths
    rm -f "$weights"
}

peers() {
    torch_peers
    llama_peers
}

# The kernels' tests once more, watched: any report fails. racecheck sees shared memory alone.
sanitizer() {
    [ -n "${KERNEL_TESTS:-}${LIB_TESTS:-}" ] || return
    local tool folder sanitizer=''
    for folder in "$(dirname "$(command -v compute-sanitizer || echo /none/compute-sanitizer)")" \
        "${CUDA_HOME:-/usr/local/cuda}/bin"; do
        [ -x "$folder/compute-sanitizer" ] && sanitizer="$folder/compute-sanitizer" && break
    done
    if [ -z "$sanitizer" ]; then
        skipped sanitize "no compute-sanitizer in PATH or CUDA_HOME"
        return
    fi
    for tool in memcheck racecheck synccheck; do
        # shellcheck disable=SC2206 — flags with spaces between
        local watched=("$sanitizer" --tool $tool --error-exitcode 1 ${SANITIZER_FLAGS:-})
        [ -z "${LIB_TESTS:-}" ] ||
            timed "sanitize-$tool-lib" 120 "${watched[@]}" "$LIB_TESTS" --test-threads 1 ops::cuda
        [ -z "${KERNEL_TESTS:-}" ] ||
            timed "sanitize-$tool-kernels" 300 "${watched[@]}" "$KERNEL_TESTS" --test-threads 1
    done
}

$on_gpu && nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,temperature.gpu,power.draw \
    --format=csv,noheader | tee "$out/gpu.txt"
for stage in $stages; do "$stage"; done
rm -rf "$out/cache"
"$python" scripts/cuda/summary.py "$out" | tee "$out/summary.md"
near=${PIPESTATUS[0]}
# Fails where a step did, or where the device is not near the CPU.
! cut -f 2 "$out/steps.tsv" | grep -qvE '^(0|skipped)$' && [ "$near" = 0 ]
