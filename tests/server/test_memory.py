"""Auxiliary caches: nothing leaks, whoever hangs up, and the bound holds under any load."""

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from steersman.guidance.cache import BLOCK_SIZE
from tests.server.polling import assert_no_block_stays_in_use
from tests.support.random_input import random_guidance, random_prompts
from tests.support.server import Server
from tests.support.tiny import END
from tests.support.traffic import Asked, ask, disconnect, gather_limited

REQUESTS = 500
CACHE_TOKENS = 768


def test_half_of_500_requests_hang_up_and_no_block_stays_in_use(server: Server) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    assert_no_block_stays_in_use(server)
    asked = [
        Asked(prompt, random_guidance(rng), 12, {"temperature": 1})
        for prompt in random_prompts(rng, REQUESTS, longest=50)
    ]

    async def run() -> None:
        async with server.async_client as client:
            await gather_limited(32, [disconnect(client, a, after=rng.choice([1, 3, 5, 99, 99, 99])) for a in asked])

    with _watching(server) as seen:
        asyncio.run(run())
    assert max(seen["first"]) > 0
    assert max(seen["second"]) > 0
    assert_no_block_stays_in_use(server)


@pytest.fixture(scope="module")
def tight_server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its auxiliary cache has room for three or four of the longest requests."""
    gib = CACHE_TOKENS * 512 / 2**30
    flags = ["--served-model-name", "base", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    own = [
        "--max-num-seqs",
        "64",
        "--reward-model",
        f"first={models / 'first'}",
        "--reward-model",
        f"atop={models / 'atop'}",
        "--guidance-cache",
        f"{gib + 1e-7:.9f}",
    ]
    with Server(tmp_path_factory.mktemp("tight") / "log", str(models / "base"), *flags, *own) as running:
        yield running


def test_a_small_cache_makes_requests_wait_and_never_overflows(tight_server: Server) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    guidance = {"method": "pargs", "reward_model": "first", "top_k": 4}
    prompts = random_prompts(rng, 64, longest=100)
    never_ending = {"logit_bias": {str(END): -100}}
    crowd = [Asked(p, guidance, rng.randint(20, 90), {"temperature": 0, **never_ending}) for p in prompts]
    endless = [Asked(p, guidance, 150, {"temperature": 1}) for p in prompts[:16]]

    async def run() -> tuple[list[Any], list[Any]]:
        async with tight_server.async_client as client:
            hasty = [disconnect(client, asked, after=rng.randint(1, 6)) for asked in endless]
            together = (await asyncio.gather(*(ask(client, a) for a in crowd), *hasty))[: len(crowd)]
            return together, [await ask(client, asked) for asked in crowd[:8]]

    with _watching(tight_server) as seen:
        together, alone = asyncio.run(run())
    assert all(len(answer[0].tokens) == asked.max_tokens for answer, asked in zip(together, crowd, strict=True))
    assert [a[0].tokens for a in together[:8]] == [a[0].tokens for a in alone]
    capacity = _cache_tokens(tight_server) // BLOCK_SIZE
    assert 3 * 190 <= capacity * BLOCK_SIZE <= CACHE_TOKENS
    assert capacity / 2 < max(seen["first"]) <= capacity
    assert tight_server.process.poll() is None
    assert_no_block_stays_in_use(tight_server)


def test_a_request_that_heads_alone_guide_does_not_wait_for_the_cache(tight_server: Server) -> None:
    causal: dict[str, Any] = {"method": "pargs", "reward_model": "first", "top_k": 4}
    long = Asked([5] * 100, causal, 150, {"temperature": 0, "ignore_eos": True})
    short = Asked([6] * 100, {**causal, "reward_model": "atop"}, 4, {"temperature": 0})

    async def run() -> None:
        async with tight_server.async_client as client:
            crowd = [asyncio.create_task(ask(client, long)) for _ in range(12)]
            while not tight_server.blocks_in_use()["first"]:
                await asyncio.sleep(0.05)
            (answer,) = await ask(client, short)
            waiting = [task for task in crowd if not task.done()]
            assert len(waiting) > 4, "most of the crowd still waits for its turn"
            assert answer.guidance is not None
            assert answer.guidance["rewards"]["atop"] is not None
            await asyncio.gather(*crowd)

    asyncio.run(run())
    assert_no_block_stays_in_use(tight_server)


def test_what_can_never_fit_is_refused_at_once(tight_server: Server) -> None:
    # A choice of 192 tokens takes whole blocks.
    fields: dict[str, Any] = {"model": "base", "prompt": [5] * 100, "max_tokens": 92}
    guidance = {"method": "pargs", "reward_model": "first"}
    fitting = _cache_tokens(tight_server) // 192
    with pytest.raises(openai.BadRequestError, match="--guidance-cache") as caught:
        tight_server.client.completions.create(**fields, n=fitting + 1, extra_body={"guidance": guidance})
    assert caught.value.param == "max_tokens"
    answer = tight_server.client.completions.create(**fields, n=fitting, extra_body={"guidance": guidance})
    assert len(answer.choices) == fitting > 1


def _cache_tokens(server: Server) -> int:
    limits = httpx.get(f"{server.url}/v1/guidance", timeout=60).json()["limits"]
    return int(limits["cache_tokens"]["first"])


@contextmanager
def _watching(server: Server) -> Iterator[dict[str, list[int]]]:
    """Collects the blocks in use, by model, while requests run."""
    seen: dict[str, list[int]] = {name: [] for name in server.blocks_in_use()}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            for name, blocks in server.blocks_in_use().items():
                seen[name].append(blocks)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        stop.set()
        watcher.join()
