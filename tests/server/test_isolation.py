"""A request that a reward model cannot score fails alone and says so; nobody else notices."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from tests.conftest import POISON
from tests.server.polling import assert_no_block_stays_in_use
from tests.support.oracle import Oracle, load_oracle
from tests.support.server import Server
from tests.support.tiny import VOCABULARY
from tests.support.traffic import Asked, ask

BROKEN = {"method": "pargs", "reward_model": "broken", "beta": 1.5, "top_k": 5}
UNPOISONED = {str(POISON): -100}
"""Without this bias the poisonous token may turn up among the candidates of any prompt."""
NEIGHBOURS = [
    BROKEN,
    {**BROKEN, "reward_model": "first"},
    {**BROKEN, "reward_model": "text", "top_k": 3},
    {"method": "pargs", "rewards": [{"model": "broken"}, {"model": "second", "weight": 0.5}]},
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("n", [1, 2])
def test_the_poisoned_request_fails_and_names_the_model(
    server: Server, rng: random.Random, stream: bool, n: int
) -> None:
    fields: dict[str, Any] = {"model": "base", "prompt": _poisoned(rng), "max_tokens": 20, "n": n, "stream": stream}
    error = _failure(server.client, fields, stream)
    assert "'broken'" in error["message"]
    assert "not a finite number" in error["message"]
    assert error["code"] == 500
    assert error["type"] == "InternalServerError"
    assert_no_block_stays_in_use(server)


def test_one_poisoned_prompt_of_several_fails_its_own_request(server: Server, rng: random.Random) -> None:
    client = server.client
    fields: dict[str, Any] = {"model": "base", "prompt": [_prompt(rng), _poisoned(rng)], "max_tokens": 8}
    assert "'broken'" in _failure(client, fields, stream=False)["message"]
    assert_no_block_stays_in_use(server)


def test_what_more_candidates_left_behind_does_not_reach_fewer(server: Server, rng: random.Random) -> None:
    body = {"model": "base", "prompt": _poisoned(rng), "max_tokens": 5, "guidance": {**BROKEN, "top_k": 12}}
    assert server.post("/v1/completions", body).status_code == 500
    clean = _clean(rng, {**BROKEN, "top_k": 2})
    answer = server.complete(clean.prompt, clean.guidance, max_tokens=5, logit_bias=UNPOISONED)
    assert answer["choices"][0]["guidance"]["tokens"] >= 1


def test_neighbours_of_poisoned_requests_get_what_they_get_alone(server: Server, rng: random.Random) -> None:
    neighbours = [_clean(rng, NEIGHBOURS[number % len(NEIGHBOURS)]) for number in range(8)]
    poisoned = [Asked(_poisoned(rng), guidance, 30, {}) for guidance in (BROKEN, NEIGHBOURS[3]) * 3]

    async def run() -> tuple[list[Any], list[Any], list[Any]]:
        async with server.async_client as client:
            alone = [await ask(client, asked) for asked in neighbours]
            everyone = [
                ask(client, asked) for pair in zip(neighbours, poisoned + poisoned, strict=False) for asked in pair
            ]
            mixed = await asyncio.gather(*everyone, return_exceptions=True)
            return alone, mixed[::2], mixed[1::2]

    alone, together, failures = asyncio.run(run())
    assert [[c.tokens for c in answer] for answer in together] == [[c.tokens for c in answer] for answer in alone]
    assert len(failures) == 8
    for failure in failures:
        assert isinstance(failure, openai.InternalServerError), failure
        assert "'broken'" in failure.message
    assert server.process is None or server.process.poll() is None
    assert_no_block_stays_in_use(server)


def test_prefixes_of_poisoned_prompts_are_scored_rightly_afterwards(
    server: Server, models: Path, rng: random.Random
) -> None:
    oracle = _load_unpoisoned(models)
    for _ in range(4):
        prefix = [_token(rng) for _ in range(rng.randint(33, 100))]
        poisoned = [*prefix, POISON, *(_token(rng) for _ in range(40))]
        fields: dict[str, Any] = {"model": "base", "prompt": poisoned, "max_tokens": 4}
        assert "'broken'" in _failure(server.client, fields, stream=False)["message"]
        for extra in (0, 1, 41):
            _check_against(oracle, server, [*prefix, *(_token(rng) for _ in range(extra))])


def _load_unpoisoned(models: Path) -> Oracle:
    """The oracle of requests that may not draw the poison."""
    oracle = load_oracle(models, ("broken",))

    def base(tokens: Sequence[int]) -> torch.Tensor:
        logits = oracle.logits(tokens).clone()
        logits[POISON] = -torch.inf
        return logits

    return replace(oracle, models=replace(oracle.models, base=base))


def _check_against(oracle: Oracle, server: Server, prompt: list[int]) -> None:
    allowed = [token for token in range(VOCABULARY) if token != POISON]
    fields = {"temperature": 0, "return_token_ids": True, "allowed_token_ids": allowed}
    answer = server.complete(prompt, BROKEN, max_tokens=8, **fields)["choices"][0]
    oracle.assert_greedy(prompt, BROKEN, answer["token_ids"], 8)
    assert oracle.assert_report(prompt, BROKEN, answer["token_ids"], answer["guidance"])


def _failure(client: openai.OpenAI, fields: dict[str, Any], stream: bool) -> dict[str, Any]:
    """The error of a request that must fail, as OpenAI's clients see it."""
    with pytest.raises(openai.APIError) as caught:
        _receive(client, {**fields, "stream": stream})
    assert stream or isinstance(caught.value, openai.InternalServerError)
    body = caught.value.body
    assert isinstance(body, dict)
    return body.get("error", body)


def _receive(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    answer = client.completions.create(**fields, extra_body={"guidance": BROKEN})
    if fields["stream"]:
        list(answer)


def _clean(rng: random.Random, guidance: dict[str, Any]) -> Asked:
    return Asked(_prompt(rng), guidance, rng.randint(20, 40), {"temperature": 0, "logit_bias": UNPOISONED})


def _poisoned(rng: random.Random) -> list[int]:
    prompt = _prompt(rng)
    prompt.insert(rng.randint(0, len(prompt)), POISON)
    return prompt


def _prompt(rng: random.Random) -> list[int]:
    return [_token(rng) for _ in range(rng.randint(1, 80))]


def _token(rng: random.Random) -> int:
    return rng.randrange(2, 310)
