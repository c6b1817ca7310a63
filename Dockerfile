# syntax=docker/dockerfile:1
# Two images: `--target cpu` (the last stage, so the default one) with the demo models, and `--target cuda` for GPUs.
# Pin the bases by digest where you build releases (`docker buildx imagetools inspect NAME:TAG` prints it).

FROM debian:12.11-slim AS python
# Security updates of a pinned release are wanted, so packages carry no versions of their own.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get upgrade --yes \
    && apt-get install --yes --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*


FROM python AS uv
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# pip and uv keep their caches there; the mounts leave them out of the layers.
ENV XDG_CACHE_HOME=/var/cache/build
COPY requirements/cpu.lock requirements/
RUN --mount=type=cache,target=/var/cache/build \
    python3 -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-deps "$(grep '^uv==' requirements/cpu.lock)"
ENV PATH=/opt/uv/bin:$PATH UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never


FROM uv AS wheel
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY kernels kernels
COPY guidance guidance
COPY server server
COPY training training
COPY clients clients
COPY benchmarks benchmarks
RUN --mount=type=cache,target=/var/cache/build \
    uv build --wheel --build-constraint requirements/cpu.lock --out-dir /dist


# What serving needs, as the lock has it, and nothing else of it. The packages that are left out are those of the lock's head.
FROM uv AS environment
ARG TORCH_VERSION=2.13.0
# A CPU build of torch lies in an index of its own; behind a mirror give other flags of `uv pip install`.
ARG TORCH_SOURCE=--torch-backend=cpu
ENV VIRTUAL_ENV=/opt/steersman
RUN --mount=type=cache,target=/var/cache/build \
    uv venv --python /usr/bin/python3 "$VIRTUAL_ENV" \
    && uv pip install --no-deps --compile-bytecode "$TORCH_SOURCE" "torch==$TORCH_VERSION"
COPY pyproject.toml ./
RUN --mount=type=cache,target=/var/cache/build \
    printf '%s\n' torchaudio torchcodec torchvision > unused.txt \
    && uv pip install --requirement pyproject.toml --extra cpu --constraint requirements/cpu.lock --excludes unused.txt \
        --only-binary :all: --compile-bytecode \
    && uv pip freeze > installed.txt \
    && ! grep --invert-match --line-regexp --fixed-strings --file=requirements/cpu.lock \
        --regexp="torch==$TORCH_VERSION+cpu" installed.txt
COPY --from=wheel /dist /dist
RUN uv pip install --no-deps --no-index --compile-bytecode /dist/*.whl


# vLLM's own image: the very build of vLLM, torch and CUDA that its project tests together, with the compiler that Triton
# and FlashInfer call at run time. Installing vLLM on a bare CUDA image ends in the same packages, less tested.
FROM vllm/vllm-openai:v0.32.0 AS cuda
LABEL org.opencontainers.image.title="steersman" \
      org.opencontainers.image.description="vLLM's OpenAI server with guidance while it decodes, for NVIDIA GPUs" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --no-log-init --uid 10001 --home-dir /var/lib/steersman --create-home steersman
# Nothing that the image has is touched: what it lacks comes without dependencies, then pyproject.toml's ranges are checked.
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    --mount=type=bind,source=requirements/cpu.lock,target=/tmp/cpu.lock \
    --mount=type=cache,target=/var/cache/build \
    XDG_CACHE_HOME=/var/cache/build uv pip install --system --no-deps /dist/*.whl "$(grep '^peft==' /tmp/cpu.lock)" \
    && python3 -c "import sys; from importlib.metadata import requires, version; \
from packaging.requirements import Requirement; \
needed = [r for r in map(Requirement, requires('steersman')) if not r.marker or r.marker.evaluate({'extra': 'cuda'})]; \
sys.exit(', '.join(f'{r}: {version(r.name)}' for r in needed if version(r.name) not in r.specifier) or 0)"
ENV HOME=/var/lib/steersman PYTHONUNBUFFERED=1 VLLM_NO_USAGE_STATS=1 HF_HUB_DISABLE_TELEMETRY=1
USER 10001
WORKDIR /var/lib/steersman
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=20m --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# vLLM heeds SIGTERM only when its models are loaded; as process 1 it would not even be killed by it before.
ENTRYPOINT ["tini", "--", "steersman"]
CMD ["--help"]


FROM python AS cpu
LABEL org.opencontainers.image.title="steersman" \
      org.opencontainers.image.description="vLLM's OpenAI server with guidance while it decodes, for CPUs, with demo models" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# vLLM's CPU kernels need libnuma, and its workers ask lscpu, which Debian always has.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 tini \
    && rm -rf /var/lib/apt/lists/*
COPY --from=environment /opt/steersman /opt/steersman
RUN useradd --no-log-init --uid 10001 --home-dir /var/lib/steersman --create-home steersman \
    && ln -s /opt/steersman/lib/python3.11/site-packages/steersman/training/world /demo
ENV PATH=/opt/steersman/bin:$PATH \
    HOME=/var/lib/steersman PYTHONUNBUFFERED=1 VLLM_NO_USAGE_STATS=1 HF_HUB_DISABLE_TELEMETRY=1 \
    VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1
USER 10001
WORKDIR /var/lib/steersman
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=20m --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["tini", "--", "steersman"]
# Eagerly: torch.compile needs a C++ compiler on a CPU, and there is none here.
CMD ["serve", "/demo/models/base", "--served-model-name", "demo", "--host", "0.0.0.0", "--dtype", "float32", \
     "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "64", "--guidance-cache", "0.25", \
     "--guidance-presets", "/demo/presets.yaml", "--reward-model", "instant=/demo/models/reward-head", \
     "--reward-model", "helpful=/demo/models/reward-partial", "--reward-model", "swift=/demo/models/reward-vocabulary", \
     "--reward-model", "full=/demo/models/reward-full", "--reward-model", "judge=/demo/models/reward-evaluation", \
     "--policy", "dpo=/demo/models/dpo", "--policy", "dpo-head=/demo/models/dpo-head"]
