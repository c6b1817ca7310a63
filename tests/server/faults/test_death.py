"""An engine that is killed: an error and no silence, health that fails, and a supervisor's server that is back."""

import random

import httpx

from tests.server.faults.supervised import SupervisedServer
from tests.server.polling import HEALTH_LIMIT_S, wait_until_unhealthy
from tests.support.streams import GUIDED, assert_all_failed, mixed_bodies, read_streams


def test_a_killed_engine_ends_every_stream_with_an_error_and_is_started_again(
    supervised: SupervisedServer, rng: random.Random
) -> None:
    before = len(supervised.codes)

    async def kill(client: httpx.AsyncClient) -> None:
        supervised.processes["engine"].kill()
        assert await wait_until_unhealthy(client) < HEALTH_LIMIT_S

    assert_all_failed(read_streams(supervised, mixed_bodies(rng, 400), kill))
    supervised.wait_for_restart(before)
    assert supervised.codes[before:] == [1]
    assert (
        supervised.complete("the lamp", GUIDED, max_tokens=8, ignore_eos=True)["choices"][0]["guidance"]["tokens"] == 8
    )
    assert "steersman: the server stopped: the engine has died" in supervised.log.read_text()
