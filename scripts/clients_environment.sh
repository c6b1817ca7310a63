#!/usr/bin/env bash
# clients_environment.sh FOLDER: an environment with other people's clients, Node and its packages in FOLDER/node.
set -euo pipefail
folder=$(realpath -m "${1:?folder}")
cd "$(dirname "$0")/.."

rm -rf "$folder"
.venv/bin/uv venv --quiet --python .venv/bin/python "$folder"
.venv/bin/uv pip install --quiet --python "$folder/bin/python" --requirement requirements/clients.lock
mkdir "$folder/node"
cp tests/clients/outside/package.json tests/clients/outside/*.mjs "$folder/node"
PATH="$folder/bin:$PATH" npm --prefix "$folder/node" install --no-package-lock --no-audit --no-fund --loglevel error >/dev/null
