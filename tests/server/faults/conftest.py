"""One supervised server for every test in this folder; the last file of them leaves it dead."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import tests.support
from tests.conftest import ONE_PROCESS
from tests.server.faults.supervised import SupervisedServer
from tests.support.tiny import VOCABULARY, save_base

FAULTY = Path(tests.support.__file__).parent / "faulty"
BEYOND = range(VOCABULARY, VOCABULARY + 8)
"""Token ids that the base alone has."""
MODEL_LIMIT_S = 10
"""A model that takes longer hangs."""


@pytest.fixture(scope="session")
def supervised(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SupervisedServer]:
    """Serves `base`, whose vocabulary is padded beyond what its reward models read, with `first`, `raising` and
    `hanging`, and a clock that can be set."""
    folder = tmp_path_factory.mktemp("supervised")
    base = save_base(folder / "base", vocab_size=BEYOND.stop)
    (folder / "clock").write_text("0")
    rewards = [f"{name}={models / 'first'}" for name in ("first", "raising", "hanging")]
    flags = [
        *(str(base), "--served-model-name", "base", "--dtype", "float32", "--enforce-eager"),
        *("--distributed-executor-backend", ONE_PROCESS, "--max-model-len", "512", "--max-num-seqs", "64"),
        *("--guidance-cache", "0.3", "--request-timeout", "120"),
        *(flag for reward in rewards for flag in ("--reward-model", reward)),
    ]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(FAULTY), os.environ.get("PYTHONPATH", "")]),
        "STEERSMAN_WALL_CLOCK": str(folder / "clock"),
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(MODEL_LIMIT_S),
        # vLLM compiles a function for the first request with logprobs, which takes longer than everything else.
        "TORCHDYNAMO_DISABLE": "1",
    }
    with SupervisedServer(folder / "log", *flags, environment=environment) as running:
        yield running
