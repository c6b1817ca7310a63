"""An engine that is killed, or hangs in a model: an error and no silence, failing health, and a server that is back."""

import random
import time
from typing import Any

import httpx

from tests.server.faults.conftest import MODEL_LIMIT_S
from tests.server.faults.streams import GUIDED, Stream, read_streams, streamed
from tests.server.faults.supervised import HEALTH_LIMIT_S, SupervisedServer
from tests.support.faulty.sitecustomize import FAULTS
from tests.support.traffic import random_prompts

KINDS: list[dict[str, Any]] = [{}, {"guidance": GUIDED}, {"guidance": GUIDED, "n": 2, "temperature": 1}]


def test_a_killed_engine_ends_every_stream_with_an_error_and_is_started_again(
    supervised: SupervisedServer, rng: random.Random
) -> None:
    before = len(supervised.codes)

    async def kill(client: httpx.AsyncClient) -> None:
        supervised.processes["engine"].kill()
        assert await supervised.wait_until_unhealthy(client, 10 * HEALTH_LIMIT_S) < HEALTH_LIMIT_S

    _assert_all_failed(read_streams(supervised, _bodies(rng), kill))
    _assert_serves_again(supervised, before)
    assert "steersman: the server stopped: the engine has died" in supervised.log.read_text()


def test_a_model_that_hangs_ends_the_engine_when_its_time_is_over(
    supervised: SupervisedServer, rng: random.Random
) -> None:
    before, written = len(supervised.codes), len(supervised.log.read_text())
    endless = streamed([7, FAULTS["hanging"], 9], 20, guidance={**GUIDED, "reward_model": "hanging"}, stream=False)

    async def hang(client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        response = await client.post("/v1/completions", json=endless)
        assert response.status_code == 500
        assert time.monotonic() - began > MODEL_LIMIT_S
        assert await supervised.wait_until_unhealthy(client, 10 * HEALTH_LIMIT_S) < HEALTH_LIMIT_S

    _assert_all_failed(read_streams(supervised, _bodies(rng), hang))
    _assert_serves_again(supervised, before)
    log = supervised.log.read_text()[written:]
    assert f"waited for a model for more than {MODEL_LIMIT_S} s" in log
    assert "sitecustomize.py" in log, "the stacks do not show where it hung"


def _bodies(rng: random.Random) -> list[dict[str, Any]]:
    return [streamed(prompt, 400, **kind) for prompt, kind in zip(random_prompts(rng, 3), KINDS, strict=True)]


def _assert_all_failed(streams: list[Stream]) -> None:
    for stream in streams:
        assert stream.error, f"ended with {stream.events[-1:]}"


def _assert_serves_again(supervised: SupervisedServer, before: int) -> None:
    supervised.wait_for_restart(before)
    assert supervised.codes[before:] == [1]
    answer = supervised.complete("the lamp", GUIDED, max_tokens=8, ignore_eos=True)
    assert answer["choices"][0]["guidance"]["tokens"] == 8
