"""An engine that is killed, or hangs in a model: an error and no silence, health that fails, and a server that is back."""

import asyncio
import random
import time
from typing import Any

import httpx
import pytest

from tests.server.faults.conftest import MODEL_LIMIT_S
from tests.server.faults.streams import GUIDED, Stream, streamed
from tests.server.faults.supervised import HEALTH_LIMIT_S, SupervisedServer
from tests.support.faulty.sitecustomize import FAULTS

TOKENS = 480
HANGING = {**GUIDED, "reward_model": "hanging"}
BYSTANDERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guidance": GUIDED},
    "several": {"guidance": GUIDED, "n": 2, "temperature": 1},
}


def test_a_killed_engine_ends_every_stream_with_an_error_and_is_started_again(
    supervised: SupervisedServer, rng: random.Random
) -> None:
    before = len(supervised.codes)
    engine = supervised.processes["engine"]

    async def kill(client: httpx.AsyncClient) -> float:
        engine.kill()
        return await supervised.wait_until_unhealthy(client, 10 * HEALTH_LIMIT_S)

    streams, unhealthy_after = asyncio.run(_during_streams(supervised, kill))
    assert unhealthy_after < HEALTH_LIMIT_S
    _assert_all_failed(streams)
    _assert_serves_again(supervised, before)
    assert "steersman: the server stopped: the engine has died" in supervised.log.read_text()


def test_a_model_that_hangs_ends_the_engine_within_its_time(supervised: SupervisedServer, rng: random.Random) -> None:
    before, written = len(supervised.codes), len(supervised.log.read_text())

    async def hang(client: httpx.AsyncClient) -> tuple[float, httpx.Response]:
        began = time.monotonic()
        body = {**streamed([7, FAULTS["hanging"], 9], 20, guidance=HANGING), "stream": False}
        response = await client.post("/v1/completions", json=body)
        await supervised.wait_until_unhealthy(client, HEALTH_LIMIT_S)
        return time.monotonic() - began, response

    streams, (took, response) = asyncio.run(_during_streams(supervised, hang))
    assert response.status_code == 500
    assert took > MODEL_LIMIT_S
    _assert_all_failed(streams)
    _assert_serves_again(supervised, before)
    log = supervised.log.read_text()[written:]
    assert f"waited for a model for more than {MODEL_LIMIT_S} s" in log
    assert "sitecustomize.py" in log, "the stacks do not show where it hung"


def _assert_all_failed(streams: dict[str, Stream]) -> None:
    for name, stream in streams.items():
        assert stream.error, f"{name} ended with {stream.events[-1:]}"


def _assert_serves_again(supervised: SupervisedServer, before: int) -> None:
    supervised.wait_for_restart(before)
    assert supervised.codes[before:] == [1]
    answer = supervised.complete("the lamp", GUIDED, max_tokens=8, ignore_eos=True)
    assert answer["choices"][0]["guidance"]["tokens"] == 8


async def _during_streams(supervised: SupervisedServer, act: Any) -> tuple[dict[str, Stream], Any]:
    """Acts once every stream has begun."""
    streams = {name: Stream() for name in BYSTANDERS}
    async with httpx.AsyncClient(base_url=supervised.url, timeout=120) as client:
        reading = [
            asyncio.ensure_future(streams[name].read(client, streamed(name, TOKENS, **fields)))
            for name, fields in BYSTANDERS.items()
        ]
        for stream in streams.values():
            await stream.begun.wait()
        found = await act(client)
        assert not [result for result in await asyncio.gather(*reading, return_exceptions=True) if result is None]
    return streams, found
