"""Sampled tokens follow the exact distribution of every method, and of no other, through the server."""

import asyncio
import random
from pathlib import Path

import pytest

from tests.support.distribution import CASES, DRAWS, check_draws
from tests.support.oracle import load_oracle
from tests.support.server import Server
from tests.support.traffic import Asked, ask, gather_limited


@pytest.fixture
def prompt() -> list[int]:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    return [rng.randrange(2, 300) for _ in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_tokens(server: Server, models: Path, prompt: list[int], name: str) -> None:
    _check(server, models, prompt, name, length=2)


@pytest.mark.parametrize("name", ["gated reward", "mixed 0.3", "product of three", "kl_threshold monte carlo"])
def test_one_token_on_model_runner_v2(server_v2: Server, models: Path, prompt: list[int], name: str) -> None:
    _check(server_v2, models, prompt[:1], name, length=1)


def _check(server: Server, models: Path, prompt: list[int], name: str, length: int) -> None:
    guidance, right, wrong = CASES[name](load_oracle(models), prompt, length)
    asked = Asked(prompt, guidance, length, {"temperature": 1.0, "n": 100})

    async def run() -> list[list[int]]:
        client = server.async_client
        answers = await gather_limited(4, [ask(client, asked) for _ in range(DRAWS // 100)])
        return [choice.tokens for choices in answers for choice in choices]

    check_draws(asyncio.run(run()), right, wrong)
