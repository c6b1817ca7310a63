"""Two workers of a tensor-parallel group: the text of one process, and everything counted once."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.server.polling import HEALTH_LIMIT_S, wait_until, wait_until_unhealthy
from tests.support.metrics import growth, read_metrics, total
from tests.support.random_input import any_guidance, random_prompts
from tests.support.server import Server
from tests.support.streams import assert_all_failed, mixed_bodies, read_streams
from tests.support.traffic import Answered, Asked, ask, gather_limited

REWARDS, POLICIES = ("first", "second", "every", "atop"), ("expert", "other", "tilted")


@pytest.fixture(scope="module")
def parallel(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = [
        *(str(models / "base"), "--served-model-name", "base", "--dtype", "float32", "--enforce-eager"),
        *("--tensor-parallel-size", "2", "--max-model-len", "256", "--max-num-seqs", "8", "--guidance-cache", "0.1"),
        *(flag for name in REWARDS for flag in ("--reward-model", f"{name}={models / name}")),
        *(flag for name in POLICIES for flag in ("--policy", f"{name}={models / name}")),
    ]
    with Server(tmp_path_factory.mktemp("parallel") / "log", *flags) as running:
        yield running


def test_text_is_that_of_one_process_and_is_counted_once(server: Server, parallel: Server, rng: random.Random) -> None:
    asked = [
        Asked(prompt, any_guidance(rng) if n % 4 else None, 16, {"temperature": n % 2, "seed": n, "n": 1 + n % 2})
        for n, prompt in enumerate(random_prompts(rng, 24))
    ]
    before = read_metrics(parallel)
    expected, answered = (asyncio.run(_ask_all(running, asked)) for running in (server, parallel))
    assert [[c.tokens for c in choices] for choices in answered] == [
        [c.tokens for c in choices] for choices in expected
    ]
    wait_until(lambda: not total(read_metrics(parallel), "steersman_running_requests"), "every request is over")
    grown = growth(before, read_metrics(parallel))
    reports = [choice.guidance for choices in answered for choice in choices if choice.guidance is not None]
    assert total(grown, "steersman_guided_tokens_total") == sum(report["guided_tokens"] for report in reports) > 0
    read = sum(report["reward_model_tokens"] + report["policy_tokens"] for report in reports)
    assert total(grown, "steersman_auxiliary_tokens_total") == read > 0
    assert total(grown, "vllm:generation_tokens_total") == sum(len(t) for tokens in _tokens(answered) for t in tokens)
    listed = {model["name"]: model for model in parallel.get("/v1/guidance").json()["reward_models"]}
    assert total(read_metrics(parallel), "steersman_cache_blocks", model="first") == listed["first"]["cache_blocks"]


def test_a_worker_that_is_killed_ends_every_stream_with_an_error_and_the_server(
    parallel: Server, rng: random.Random
) -> None:
    """The last test of this file: the server is gone afterwards."""
    below = psutil.Process(parallel.process.pid).children(recursive=True)
    workers = [process for process in below if "Worker" in process.name()]
    assert len(workers) == 2

    async def kill(client: httpx.AsyncClient) -> None:
        rng.choice(workers).kill()
        assert await wait_until_unhealthy(client) < HEALTH_LIMIT_S

    assert_all_failed(read_streams(parallel, mixed_bodies(rng, 160), kill))
    assert parallel.process.wait(timeout=60) == 1


def _tokens(answered: list[list[Answered]]) -> list[list[list[int]]]:
    return [[choice.tokens for choice in choices] for choices in answered]


async def _ask_all(running: Server, asked: list[Asked]) -> list[list[Answered]]:
    async with running.async_client as client:
        return await gather_limited(8, [ask(client, one) for one in asked])
