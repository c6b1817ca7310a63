"""Token ids that the base has and a reward model has not: refused in a prompt, never chosen, and the engine lives."""

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from steersman.clients.reports import GuidanceReport
from tests.server.faults.conftest import BEYOND
from tests.server.faults.supervised import SupervisedServer
from tests.server.polling import assert_no_block_stays_in_use
from tests.support.random_input import random_prompts
from tests.support.streams import GUIDED, read_streams, streamed
from tests.support.tiny import VOCABULARY

BLOCKWISE = {"method": "blockwise", "reward_model": "first", "n": 2, "block": 4}
BEST_OF_N = {"method": "best_of_n", "reward_model": "first", "n": 2}
PREFERRED = {str(token): 100 for token in BEYOND}
"""A bias by which the base takes them before all others."""


@pytest.fixture(autouse=True)
def _the_server_lives(supervised: SupervisedServer) -> Iterator[None]:
    """It may have been ended, and started again, by tests before."""
    ended = list(supervised.codes)
    yield
    assert supervised.codes == ended


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("guidance", [GUIDED, BEST_OF_N, BLOCKWISE], ids=lambda guidance: guidance["method"])
def test_a_prompt_that_the_model_cannot_read_is_refused(
    supervised: SupervisedServer, rng: random.Random, guidance: dict[str, Any], stream: bool
) -> None:
    token = rng.choice(BEYOND)
    prompt = [*random_prompts(rng, 1)[0], token, 7]
    body = {"model": "base", "prompt": prompt, "max_tokens": 4, "temperature": 1}
    response = supervised.post("/v1/completions", {**body, "guidance": guidance, "stream": stream})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == "prompt"
    words = (f"token {token}", "reward model 'first'", f"0 to {VOCABULARY - 1}", "leave the token out")
    assert all(word in error["message"] for word in words), error
    assert supervised.post("/v1/completions", body).status_code == 200, "the base reads it"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt": [5, BEYOND[0], 6]}, "prompt"),
        ({"responses": [[7], [8, BEYOND[-1]]]}, "responses.1"),
    ],
)
def test_a_text_that_the_model_cannot_read_is_not_scored(
    supervised: SupervisedServer, change: dict[str, Any], field: str
) -> None:
    body = {"model": "first", "prompt": [5, 6], "responses": [[7, 8]]}
    response = supervised.post("/v1/rewards", {**body, **change})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == field
    assert all(word in error["message"] for word in ("'first'", "token 32", f"0 to {VOCABULARY - 1}")), error
    assert supervised.post("/v1/rewards", body).status_code == 200


def test_what_the_base_prefers_and_the_model_cannot_read_is_not_chosen(
    supervised: SupervisedServer, rng: random.Random
) -> None:
    prompts = random_prompts(rng, 6)
    kinds: list[dict[str, Any]] = [
        {"guidance": {**GUIDED, "top_k": len(BEYOND) + 4}, "logit_bias": PREFERRED},
        {"logit_bias": PREFERRED},
        {"guidance": GUIDED},
    ]
    bodies = [streamed(prompt, 60, **kind) for prompt in prompts for kind in kinds]
    alone = read_streams(supervised, [bodies[2]])[0].tokens
    failures: list[httpx.Response] = []

    async def ask_for_too_few_candidates(client: httpx.AsyncClient) -> None:
        guidance = {**GUIDED, "top_k": len(BEYOND)}
        fields = {"stream": False, "guidance": guidance, "logit_bias": PREFERRED}
        sent = [client.post("/v1/completions", json=streamed(prompt, 20, **fields)) for prompt in prompts]
        failures.extend(await asyncio.gather(*sent))

    streams = read_streams(supervised, bodies, ask_for_too_few_candidates)
    for guided, plain in zip(streams[::3], streams[1::3], strict=True):
        assert max(guided.tokens[0]) < VOCABULARY
        assert set(plain.tokens[0]) <= set(BEYOND)
    assert streams[2].tokens == alone
    for failure in failures:
        assert failure.status_code == 400
        message = failure.json()["error"]["message"]
        assert all(word in message for word in ("'first'", "raise top_k")), message
    assert_no_block_stays_in_use(supervised)


@pytest.mark.parametrize("guidance", [{**BEST_OF_N, "n": 8}, {**BLOCKWISE, "n": 8}], ids=lambda g: g["method"])
def test_samples_that_the_model_cannot_read_are_left_out_of_the_choice(
    supervised: SupervisedServer, rng: random.Random, guidance: dict[str, Any]
) -> None:
    fields = {"max_tokens": 6, "return_token_ids": True, "logit_bias": dict.fromkeys(PREFERRED, 1.5)}
    left_out = 0
    for prompt in random_prompts(rng, 8):
        answer = supervised.complete(prompt, {**guidance, "trace": True}, **fields)
        choice, report = answer["choices"][0], answer["choices"][0]["guidance"]
        assert max(choice["token_ids"]) < VOCABULARY
        rewards = [[sample["reward"] for sample in step["samples"]] for step in report["trace"]]
        for step, block in zip(report["trace"], rewards, strict=True):
            assert block[step["chosen"]] == max(reward for reward in block if reward is not None)
        unreadable = sum(block.count(None) for block in rewards)
        assert GuidanceReport.model_validate(report).unreadable_samples == unreadable
        assert answer["usage"]["completion_tokens"] == report["generated_tokens"]
        left_out += unreadable
    assert left_out > 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("guidance", [BEST_OF_N, BLOCKWISE], ids=lambda guidance: guidance["method"])
def test_a_search_whose_samples_the_model_cannot_read_is_refused(
    supervised: SupervisedServer, guidance: dict[str, Any], stream: bool
) -> None:
    body = {"model": "base", "prompt": [5, 6], "max_tokens": 4, "temperature": 1, "logit_bias": PREFERRED}
    response = supervised.post("/v1/completions", {**body, "guidance": guidance, "stream": stream})
    assert response.status_code == (200 if stream else 400), response.text
    text = response.text.removeprefix("data: ").partition("\n\n")[0]
    error = json.loads(text)["error"]
    assert (error["code"], error["param"]) == (400, "guidance.reward_model")
    words = ("reward model 'first'", f"0 to {VOCABULARY - 1}", "every sample", "allowed_token_ids")
    assert all(word in error["message"] for word in words), error


def test_what_a_model_reads_is_shown(supervised: SupervisedServer) -> None:
    (first, *_) = supervised.get("/v1/guidance").json()["reward_models"]
    assert first["vocabulary"] == VOCABULARY
