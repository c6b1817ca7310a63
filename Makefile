.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench soak evaluate evidence world gpu-pack clean

# Tiny models: a second thread per process only gets in the way of the others.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1

RUN := .venv/bin/python -m
OTHER_TRITON := .venv/triton/3.6.0
PROMETHEUS := .venv/prometheus
BARE := .venv/bare
CLIENTS := .venv/clients

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# Kernels are compiled by two releases: the one that vLLM 0.32 brings and the one that torch 2.11 does.
$(OTHER_TRITON): | setup
	.venv/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --target $@ triton==$(notdir $@)

# Dashboards and alerts are tried on a real Prometheus.
$(PROMETHEUS): | setup
	@scripts/prometheus.sh

# scripts/gpu_day.sh is rehearsed in an environment that has only what a bare GPU machine has.
$(BARE): requirements/gpu.txt requirements/gpu-pack.lock scripts/bare_environment.sh | setup
	@scripts/bare_environment.sh $@
	@touch $@

# Other people's clients, with packages that would not fit beside ours.
$(CLIENTS): requirements/clients.lock tests/clients/outside/package.json tests/clients/outside/node_client.mjs scripts/clients_environment.sh | setup
	@scripts/clients_environment.sh $@
	@touch $@

setup: ## make .venv with every pinned package
	@scripts/setup.sh

demo: setup ## serve the demo models and show one prompt with and without guidance (ONCE=1 stops after that)
	@$(RUN) steersman.cli demo

test: setup $(OTHER_TRITON) $(PROMETHEUS) $(BARE) $(CLIENTS) ## run the whole test suite, without a GPU
	$(RUN) pytest -n 2

lint: setup ## check style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: setup ## put the code into its standard form
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: setup ## measure guided against plain decoding and against the naive reference
	$(RUN) steersman.cli bench

soak: setup ## half an hour of mixed traffic: memory, latency and caches must stay flat
	$(RUN) steersman.benchmarks.soak

evaluate: setup ## measure the quality of guided answers through the server
	$(RUN) steersman.cli evaluate

evidence: setup ## measure the papers' claims in the demo world with three seeds (about 25 minutes on 2 cores)
	$(RUN) steersman.benchmarks.evidence

world: setup ## rebuild the demo world's models from nothing (about 25 minutes on 2 cores)
	$(RUN) steersman.training.world.build

gpu-pack: setup ## fetch the wheels that a bare GPU machine lacks, for scripts/gpu_day.sh
	@scripts/gpu_pack.sh .gpu/whl

clean: ## remove the environment and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
