"""A model that never returns: when its time is over the engine ends, with an error for every request.

The last file of its folder: the server is gone afterwards.
"""

import random
import time

import httpx

from tests.server.faults.conftest import MODEL_LIMIT_S
from tests.server.faults.supervised import SupervisedServer
from tests.server.polling import HEALTH_LIMIT_S, wait_until, wait_until_unhealthy
from tests.support.faulty.sitecustomize import FAULTS
from tests.support.streams import GUIDED, assert_all_failed, mixed_bodies, read_streams, streamed


def test_a_model_that_hangs_ends_the_engine_when_its_time_is_over(
    supervised: SupervisedServer, rng: random.Random
) -> None:
    written = len(supervised.log.read_text())
    endless = streamed([7, FAULTS["hanging"], 9], 20, guidance={**GUIDED, "reward_model": "hanging"}, stream=False)

    async def hang(client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        response = await client.post("/v1/completions", json=endless)
        assert response.status_code == 500
        assert time.monotonic() - began > MODEL_LIMIT_S
        assert await wait_until_unhealthy(client) < HEALTH_LIMIT_S

    assert_all_failed(read_streams(supervised, mixed_bodies(rng, 400), hang))
    wait_until(
        lambda: "the server stopped: the engine has died" in supervised.log.read_text()[written:], "it has ended"
    )
    log = supervised.log.read_text()[written:]
    assert f"waited for a model for more than {MODEL_LIMIT_S} s" in log
    assert "sitecustomize.py" in log, "the stacks do not show where it hung"
