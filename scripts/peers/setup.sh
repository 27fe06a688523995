#!/usr/bin/env bash
# Makes the Python environment of the peers: scripts/peers/setup.sh, into target/peers-venv.
#
# The versions are those that made the golden figures in tests/golden. For Linux on x86-64 PyPI's
# torch comes with CUDA's libraries (5.6 GB installed); TORCH_INDEX=URL takes torch from another
# index, such as PyTorch's own of CPU wheels. PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly VENV="target/peers-venv"
readonly TORCH="torch==2.15.0"
readonly REST=(transformers==5.23.0 peft==0.21.2 safetensors numpy gguf==0.19.0)

die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

python="${PYTHON:-python3}"
command -v "$python" >/dev/null || die "$python: not found; install Python 3.11 or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$python is older than 3.11; set PYTHON to a newer one"

[ -x "$VENV/bin/pip" ] || "$python" -m venv "$VENV" || die "$VENV: cannot be made"
pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH" || die "$TORCH cannot be installed"
"${pip[@]}" "${REST[@]}" || die "${REST[*]}: cannot be installed"

"$VENV/bin/python" - <<'PYTHON' || die "$VENV: what was installed cannot be imported"
import importlib.metadata

import gguf, peft, torch, transformers

names = ("torch", "transformers", "peft", "safetensors", "numpy", "gguf")
print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
PYTHON
printf '%s\n' "ready: $VENV/bin/python scripts/peers/lora_step.py --help"
