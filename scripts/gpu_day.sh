#!/usr/bin/env bash
# Everything that only a GPU can tell, on a bare machine with one and no network, in nine minutes:
#   bash scripts/gpu_day.sh [STAGE ...]
# Needs Python with torch, triton, transformers and pytest, and the wheels of `make gpu-pack` beside the checkout.
# Results lie in $OUT (out/gpu-day); `python -m steersman.benchmarks.gpu.report $OUT --keep` puts them into the project.
# Without a GPU the same stages run at tiny sizes.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
pack=${PACK:-.gpu/whl}
site=${SITE:-$(mktemp -d)}
began=$SECONDS

ls "$pack"/*.whl >/dev/null 2>&1 || { echo "gpu_day: no wheels in $pack; make gpu-pack fetches them, where there is a network" >&2; exit 1; }
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$pack"/*.whl

export PYTHONPATH="$PWD/src:$site" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$site/triton}
exec "$python" -m steersman.benchmarks.gpu.day --out "${OUT:-out/gpu-day}" --seconds $((${SECONDS_IN_ALL:-540} - SECONDS + began)) "$@"
