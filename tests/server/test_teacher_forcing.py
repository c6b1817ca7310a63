"""Log-probabilities of a given text, and of an answer, under the guided distribution."""

import random
import re
from typing import Any

import pytest
import torch

from tests.support.oracle import Oracle, doubt_of
from tests.support.random_input import random_guidance, random_policy_guidance, random_prompts, random_whole_guidance
from tests.support.server import Server
from tests.support.tiny import VOCABULARY

CLOSE = 3e-4
"""Nats: rounding of float32 in sums over a vocabulary."""
ABSENT = -9999.0
"""What vLLM writes for a log-probability of -inf."""


def test_a_texts_log_probabilities_are_the_references(interface: Server, oracle: Oracle, rng: random.Random) -> None:
    compared = 0
    for number, text in enumerate(random_prompts(rng, 12, shortest=4, longest=24)):
        guidance = (random_guidance, random_policy_guidance, random_whole_guidance)[number % 3](rng)
        start = rng.randrange(1, len(text) - 1)
        choice = _score(interface, text, guidance, answer_start=start)
        own = choice["logprobs"]["token_logprobs"]
        assert own[0] is None
        assert len(own) == len(text)
        base = [float(oracle.logits(text[:n]).double().log_softmax(-1)[text[n]]) for n in range(1, start)]
        assert own[1:start] == pytest.approx(base, abs=CLOSE), "the base's, where the prompt is"
        steps = oracle.replay(text[:start], text[start:], guidance)
        if any(step.doubt < doubt_of(guidance) for step in steps):
            continue
        expected = [float(step.logprobs[token]) for step, token in zip(steps, text[start:], strict=True)]
        expected = [ABSENT if value == -torch.inf else value for value in expected]
        assert own[start:] == pytest.approx(expected, abs=CLOSE), guidance
        compared += 1
    assert compared > 3


def test_without_a_start_all_but_the_first_token_are_scored(
    interface: Server, oracle: Oracle, rng: random.Random
) -> None:
    text = random_prompts(rng, 1, shortest=8, longest=20)[0]
    guidance = {"method": "mixed", "policy": "expert", "mix": 0.7}
    steps = oracle.replay(text[:1], text[1:], guidance)
    expected = [float(step.logprobs[token]) for step, token in zip(steps, text[1:], strict=True)]
    assert _score(interface, text, guidance)["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=CLOSE)
    body = interface.complete(text, guidance, prompt_logprobs=2, max_tokens=3, temperature=0, return_token_ids=True)
    choice = body["choices"][0]
    assert [
        entry and entry[str(token)]["logprob"] for entry, token in zip(choice["prompt_logprobs"], text, strict=True)
    ][1:] == pytest.approx(expected, abs=CLOSE)
    assert body["usage"]["prompt_tokens"] == len(text)
    assert choice["guidance"]["tokens"] == len(choice["token_ids"])
    best = {int(token): entry["logprob"] for token, entry in choice["prompt_logprobs"][1].items()}
    top = steps[0].logprobs.topk(2)
    for value, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        assert best[token] == pytest.approx(value, abs=CLOSE)


def test_an_answers_logprobs_are_the_guided_distributions_before_temperature(
    interface: Server, oracle: Oracle, rng: random.Random
) -> None:
    prompt = random_prompts(rng, 1, longest=20)[0]
    for guidance in (
        {"method": "pargs", "reward_model": "first", "beta": 1.5, "top_k": 5},
        {"method": "product", "policies": {"base": -0.5, "expert": 1.5}},
        {"method": "product", "policies": {"base": -0.5, "tilted": 1.5}},
        {"method": "pargs", "reward_model": "atop", "beta": 1.5, "top_k": None},
    ):
        body = interface.complete(
            prompt, guidance, max_tokens=6, temperature=0.7, logprobs=3, ignore_eos=True, return_token_ids=True
        )
        choice = body["choices"][0]
        steps = oracle.replay(prompt, choice["token_ids"], guidance)
        expected = [float(step.logprobs[token]) for step, token in zip(steps, choice["token_ids"], strict=True)]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=CLOSE)


def test_neighbours_of_a_text_that_is_scored_keep_their_answers(interface: Server, rng: random.Random) -> None:
    prompt, text = random_prompts(rng, 2, shortest=8, longest=30)
    alone = interface.complete(prompt, None, max_tokens=12, temperature=0)["choices"][0]["text"]
    answers = interface.complete(
        [prompt, text],
        {"method": "mixed", "policy": "expert", "mix": 0.0},
        max_tokens=12,
        temperature=0,
        prompt_logprobs=0,
    )["choices"]
    assert answers[0]["text"] == alone


@pytest.mark.parametrize(
    ("guidance", "fields", "message"),
    [
        ({"method": "best_of_n", "reward_model": "first", "n": 2}, {}, "^echo: .*leave echo out"),
        (
            {"method": "best_of_n", "reward_model": "first", "n": 2},
            {"echo": False, "prompt_logprobs": 1},
            "^prompt_logprobs: .*leave prompt_logprobs out",
        ),
        ({"method": "length_control", "policy": "expert", "length": 3}, {}, "^echo: .*answer_start"),
        ({"method": "pargs", "reward_model": "first", "kl_budget": 3.0}, {}, "answer_start"),
        ({"method": "mixed", "policy": "expert", "mix": 1.0}, {"answer_start": 9}, "leaves nothing to score"),
        ({"method": "mixed", "policy": "expert", "mix": 1.0}, {"answer_start": 0}, "greater than or equal to 1"),
        (None, {"answer_start": 2}, "needs guidance"),
    ],
    ids=["samples", "samples by vLLM's field", "length", "budget", "behind the end", "zero", "plain"],
)
def test_what_has_no_such_log_probabilities_is_refused(
    interface: Server, guidance: Any, fields: dict[str, Any], message: str
) -> None:
    body = {"model": "base", "prompt": [5, 6, 7, 8, 9], "echo": True, "logprobs": 1, "max_tokens": 1, **fields}
    if guidance is not None:
        body["guidance"] = guidance
    response = interface.post("/v1/completions", body)
    assert response.status_code == 400, response.text
    assert re.search(message, response.json()["error"]["message"]), response.text


def _score(server: Server, text: list[int], guidance: dict[str, Any], **fields: Any) -> dict[str, Any]:
    assert max(text) < VOCABULARY
    body = server.complete(text, guidance, echo=True, logprobs=1, max_tokens=0, temperature=0, **fields)
    return body["choices"][0]
