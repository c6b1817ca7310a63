#!/usr/bin/env bash
# bare_environment.sh FOLDER: an environment like a bare GPU machine's, and the pack that it needs in FOLDER/whl.
# Python 3.12 where it is installed, else the project's own. torch comes with CUDA, and runs without a GPU too.
set -euo pipefail
folder=$(realpath -m "${1:?folder}")
cd "$(dirname "$0")/.."

python=.venv/bin/python
for candidate in python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python; do
    if "$candidate" -c '' 2>/dev/null; then
        python=$candidate
        break
    fi
done
rm -rf "$folder"
.venv/bin/uv venv --quiet --python "$python" "$folder"
.venv/bin/uv pip install --quiet --python "$folder/bin/python" --requirement requirements/gpu.txt
# What comes with the packages but is not there on such a machine.
.venv/bin/uv pip uninstall --quiet --python "$folder/bin/python" $(sed -n 's/==.*//p' requirements/gpu-pack.lock | grep -v typing-extensions)
scripts/gpu_pack.sh "$folder/whl" "$("$folder/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
