#!/usr/bin/env bash
# Pictures of reports for the README: docs/images/report-NAME.png of each NAME.json given.
# Usage: scripts/report-pictures.sh generate.json train.json bench.json
set -euo pipefail
cd "$(dirname "$0")/.."
flopaudit=${FLOPAUDIT:-target/release/flopaudit}
chromium=$(command -v "${CHROMIUM:-chromium}" || command -v chromium-browser || command -v google-chrome)
height=${HEIGHT:-1500}
page=$(mktemp -d)
trap 'rm -rf "$page"' EXIT
for json in "$@"; do
    name=$(basename "$json" .json)
    png=docs/images/report-$name.png
    "$flopaudit" report "$json" -o "$page/$name.html"
    # preferredColorScheme: 0 is dark, 1 is light.
    "$chromium" --headless --no-sandbox --hide-scrollbars --window-size="1000,$height" \
        --blink-settings=preferredColorScheme="${SCHEME:-1}" \
        --screenshot="$page/$name.png" "file://$page/$name.html" 2>/dev/null
    if command -v pngquant >/dev/null; then
        pngquant --force --strip --output "$png" 64 "$page/$name.png"
    else
        cp "$page/$name.png" "$png"
    fi
    echo "$png: $(stat -c %s "$png") bytes"
done
