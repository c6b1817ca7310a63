#!/usr/bin/env bash
# Makes the isolated environment in .venv from requirements/cpu.lock; does nothing where it is up to date.
set -euo pipefail
cd "$(dirname "$0")/.."

torch_version=2.13.0
stamp=.venv/.installed
wanted=$(cat requirements/cpu.lock scripts/setup.sh pyproject.toml | sha256sum | cut -d' ' -f1)
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0

python=${PYTHON:-}
if [ -z "$python" ]; then
    for name in python3.11 python3.12 python3.13 python3; do
        if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            python=$name
            break
        fi
    done
fi
[ -n "$python" ] || { echo "setup: Python 3.11, 3.12 or 3.13 is needed; name one with PYTHON=/path/to/python make ..." >&2; exit 1; }

echo "setup: making .venv with $("$python" --version)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check --no-input)
"${pip[@]}" install --quiet --no-deps "$(grep '^uv==' requirements/cpu.lock)"

# A CPU build carries the local version "+cpu". pip's own sources come first; else uv knows PyTorch's CPU index.
if ! .venv/bin/python -c "import torch, sys; sys.exit(not torch.__version__.startswith('$torch_version'))" 2>/dev/null; then
    "${pip[@]}" install --quiet --no-deps "torch==$torch_version+cpu" 2>/dev/null ||
        .venv/bin/uv pip install --python .venv/bin/python --no-deps --torch-backend cpu "torch==$torch_version"
fi
total=$(grep -c '==' requirements/cpu.lock)
"${pip[@]}" install --no-deps --no-compile --progress-bar off --requirement requirements/cpu.lock 2>.venv/install.log |
    awk -v total="$total" '
        /^(Collecting|Requirement already satisfied)/ { printf "\rsetup: %d of %d packages fetched", ++n, total; fflush() }
        /^Installing collected/ { printf "\nsetup: unpacking\n"; fflush() }' ||
    { tail -n 20 .venv/install.log >&2; exit 1; }
"${pip[@]}" install --quiet --no-deps --no-build-isolation --editable .
.venv/bin/python -c 'import torch, vllm, transformers; print("setup: torch", torch.__version__, "vllm", vllm.__version__, "transformers", transformers.__version__)'
echo "$wanted" >"$stamp"
