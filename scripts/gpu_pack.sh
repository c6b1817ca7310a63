#!/usr/bin/env bash
# gpu_pack.sh FOLDER [PYTHON_VERSION]: fetches the wheels that a bare GPU machine lacks, for scripts/gpu_day.sh.
set -euo pipefail
folder=$(realpath -m "${1:?folder}")
version=${2:-3.12}
cd "$(dirname "$0")/.."

platforms=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
for number in 17 27 28; do platforms+=(--platform "manylinux_2_${number}_x86_64"); done
rm -rf "$folder"
mkdir -p "$folder"
.venv/bin/python -m pip --disable-pip-version-check download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp "${platforms[@]}" --dest "$folder" --requirement requirements/gpu-pack.lock
echo "gpu-pack: $(du -sh "$folder" | cut -f1) in ${folder#"$PWD"/}, for Python $version"
