#!/usr/bin/env bash
# Opens the HTML report of each command in headless Chromium: screenshots at two widths, light and
# dark, into target/report-browser; fails on errors, requests, overflow, and where sorting or copying
# does not work. FLOPAUDIT_SKIP_BROWSER=1 leaves it out.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -n "${FLOPAUDIT_SKIP_BROWSER:-}" ]; then
    echo "report-browser: left out, FLOPAUDIT_SKIP_BROWSER is set"
    exit 0
fi

missing() {
    echo "report-browser: $1; install it, or set FLOPAUDIT_SKIP_BROWSER=1" >&2
    exit 1
}

browser() {
    command -v "${CHROMIUM:-chromium}" || command -v chromium-browser || command -v google-chrome
}

if ! browser >/dev/null; then
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        missing "no Chromium, and no root or apt-get to install it"
    fi
    { apt-get update && apt-get install -y --no-install-recommends chromium; } >/dev/null ||
        missing "apt-get could not install chromium"
fi
command -v npm >/dev/null || missing "no npm"

out=$PWD/target/report-browser
tools=$PWD/target/report-browser-tools
mkdir -p "$out" "$tools"
# Drives a browser that is there; it brings none.
puppeteer=puppeteer-core@24.9.0
if [ "$(cat "$tools/installed" 2>/dev/null)" != "$puppeteer" ]; then
    npm install --prefix "$tools" --no-audit --no-fund --no-save --ignore-scripts --silent "$puppeteer" ||
        missing "npm could not install $puppeteer"
    echo "$puppeteer" >"$tools/installed"
fi

cargo build --quiet
flopaudit=$PWD/target/debug/flopaudit
json=$out/json
rm -rf "$json" "$out"/*.html "$out"/*.png
mkdir -p "$json"
make() { "$flopaudit" "${@:2}" --json "$json/$1.json" >/dev/null 2>&1; }
text=examples/alice.txt
held_out=examples/alice-eval.txt
make generate generate 'What is <b>a FLOP</b>?' --preset tiny --max-new-tokens 24 --op-times
make audit audit train --preset tiny --seq 16 --lora-rank 2 --steps 2 --recompute
make count count forward --preset qwen2.5-0.5b --structure notebook
make sweep count forward --sweep seq=128..4096:*2 --sweep preset=qwen2.5-0.5b,qwen2.5-7b
make train train --preset tiny --data "$text" --eval-data "$held_out" --seq 16 --budget 5.2e9 \
    --eval-every 100 --out "$json/run"
make eval eval --preset tiny --data "$held_out" --seq 16
make plan plan examples/budget.toml
make reconcile reconcile --from 6nd --to torch --prices matmul train --batch 4 --lora-rank 8
# Real ones of one machine: measuring here would take minutes.
cp tests/report/*.json "$json/"
# The same as a larger grid: three times the points, the second time faster and in cache; and its first ten.
node -e '
const bench = JSON.parse(require("fs").readFileSync(0));
const { points } = bench;
const again = (p, n) => ({ ...p, flops_per_s: n * p.flops_per_s, intensity: n * p.intensity });
const cached = p => ({ ...p, bandwidth_use: null, limits: { ...p.limits, memory_s: null } });
bench.points = [points, points.map(p => cached(again(p, 2))), points.map(p => again(p, 1.02))].flat();
console.log(JSON.stringify(bench));
bench.points.length = 10;
require("fs").writeFileSync(process.argv[1], JSON.stringify(bench));
' "$json/bench-10.json" <tests/report/bench.json >"$json/bench-24.json"

for file in "$json"/*.json; do
    "$flopaudit" report "$file" -o "$out/$(basename "$file" .json).html"
done
"$flopaudit" report "$json"/{generate,train,plan}.json -o "$out/several.html"

NODE_PATH="$tools/node_modules" node scripts/report-browser.cjs "$(browser)" "$out"
