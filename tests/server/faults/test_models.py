"""A reward model that raises: the request that it cannot read fails by name, and no neighbour notices."""

import random

from tests.server.faults.supervised import SupervisedServer
from tests.server.polling import assert_no_block_stays_in_use
from tests.support.faulty.sitecustomize import FAULTS
from tests.support.metrics import growth, read_metrics, total
from tests.support.random_input import random_prompts
from tests.support.streams import GUIDED, read_streams, streamed

RAISING = {**GUIDED, "reward_model": "raising"}
HARMLESS = {str(FAULTS["raising"]): -100}
"""The token is nobody's candidate."""


def test_the_request_that_a_model_raises_on_fails_alone(supervised: SupervisedServer, rng: random.Random) -> None:
    prompts = random_prompts(rng, 9)
    kinds = [{"guidance": RAISING}, {"guidance": GUIDED}, {}]
    good = [streamed(p, 40, logit_bias=HARMLESS, **kinds[n % 3]) for n, p in enumerate(prompts)]
    spoilt = [streamed([*p, FAULTS["raising"], 9], 40, **kinds[0]) for p in prompts]
    before, alone = read_metrics(supervised), [read_streams(supervised, [body])[0].tokens for body in good]
    together = read_streams(supervised, [body for pair in zip(good, spoilt, strict=True) for body in pair])
    assert [stream.tokens for stream in together[::2]] == alone
    for stream in together[1::2]:
        assert stream.error is not None
        assert "reward model 'raising' could not read the answer: the lens is fogged" in stream.error["message"]
    grown = growth(before, read_metrics(supervised))
    assert total(grown, "steersman_model_failures_total", model="raising", reason="raised") == len(spoilt)
    assert_no_block_stays_in_use(supervised)


def test_a_text_that_a_model_raises_on_gets_an_error_and_not_a_score(
    supervised: SupervisedServer, rng: random.Random
) -> None:
    body = {"model": "raising", "prompt": [5, 6, FAULTS["raising"]], "responses": ["the lamp"]}
    response = supervised.post("/v1/rewards", body)
    assert response.status_code == 500, response.text
    assert "the lens is fogged" in response.json()["error"]["message"]
    assert supervised.post("/v1/rewards", {**body, "prompt": [5, 6]}).status_code == 200
