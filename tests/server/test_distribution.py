"""Sampled tokens follow the exact distribution of every method, and of no other, through the server."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ONE_PROCESS
from tests.support.distribution import CASES, COARSE_CASES, DRAWS, FEW_DRAWS, Case, check_draws
from tests.support.oracle import load_oracle
from tests.support.server import Server
from tests.support.traffic import Asked, ask, gather_limited


@pytest.fixture(scope="module")
def wide_server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose batches hold all choices of two requests: of the shared one's few cache blocks each takes one."""
    flags = [
        *(str(models / "base"), "--served-model-name", "base", "--dtype", "float32", "--enforce-eager"),
        *("--distributed-executor-backend", ONE_PROCESS, "--max-model-len", "256", "--max-num-seqs", "256"),
        *(flag for name in ("first", "second") for flag in ("--reward-model", f"{name}={models / name}")),
        *(flag for name in ("expert", "other") for flag in ("--policy", f"{name}={models / name}")),
    ]
    with Server(tmp_path_factory.mktemp("wide") / "log", *flags) as running:
        yield running


@pytest.fixture
def prompt() -> list[int]:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    return [rng.randrange(2, 300) for _ in range(2)]


# Heads are drawn from in transformers.generate, and here on V2: what their rows are given is compared token by token.
@pytest.mark.parametrize("name", [name for name in CASES if "head" not in name])
def test_two_tokens(wide_server: Server, models: Path, prompt: list[int], name: str) -> None:
    _check(wide_server, models, prompt, CASES[name], 2, DRAWS)


@pytest.mark.parametrize("name", COARSE_CASES)
def test_one_token_on_model_runner_v2(server_v2: Server, models: Path, prompt: list[int], name: str) -> None:
    _check(server_v2, models, prompt[:1], COARSE_CASES[name], 1, FEW_DRAWS)


def _check(server: Server, models: Path, prompt: list[int], case: Case, length: int, draws: int) -> None:
    guidance, right, wrong = case(load_oracle(models), prompt, length)
    asked = Asked(prompt, guidance, length, {"temperature": 1.0, "n": 100})

    async def run() -> list[list[int]]:
        client = server.async_client
        answers = await gather_limited(4, [ask(client, asked) for _ in range(draws // 100)])
        return [choice.tokens for choices in answers for choice in choices]

    drawn = asyncio.run(run())
    assert len(drawn) == draws
    check_draws(drawn, right, wrong)
