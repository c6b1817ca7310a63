"""`POST /v1/rewards`: the reward of finished texts is the reward model's own."""

import asyncio
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from steersman.server import scoring
from steersman.server.registry import LoadedModel
from steersman.server.scoring import RewardsRequest
from tests.support.oracle import causal_rewards, text_rewards
from tests.support.random_input import random_prompts
from tests.support.server import Server
from tests.support.tiny import END, VOCABULARY


@pytest.mark.parametrize("name", ["first", "second"])
def test_every_prefix_has_the_reward_of_a_plain_forward(server: Server, models: Path, name: str) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    prompt, *responses = random_prompts(random.Random(seed), 4, shortest=2, longest=30)
    body = {"model": name, "prompt": prompt, "responses": responses, "prefixes": True}
    answer = server.post("/v1/rewards", body).json()
    rewards = causal_rewards(models / name)
    for entry, response in zip(answer["data"], responses, strict=True):
        expected = [float(rewards([[*prompt, *response[: n + 1]]])) for n in range(len(response))]
        assert entry["prefix_rewards"] == pytest.approx(expected, rel=1e-5, abs=2e-5)
        assert entry["reward"] == entry["prefix_rewards"][-1]
    assert server.blocks_in_use()[name] == 0


def test_a_text_is_tokenized_as_the_base_does_and_ends_with_the_end_token(server: Server, models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    messages = [{"role": "user", "content": "write json"}]
    prompt = tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    response = " the quick fox"
    body: dict[str, Any] = {"model": "first", "messages": messages, "responses": [response]}
    rewards = causal_rewards(models / "first")
    tokens = [*prompt, *tokenizer.encode(response)]
    finished = server.post("/v1/rewards", body).json()["data"][0]
    assert finished["reward"] == pytest.approx(float(rewards([[*tokens, END]])), rel=1e-5, abs=2e-5)
    unfinished = server.post("/v1/rewards", {**body, "end_token": False}).json()["data"][0]
    assert unfinished["reward"] == pytest.approx(float(rewards([tokens])), rel=1e-5, abs=2e-5)
    assert "prefix_rewards" not in unfinished


def test_a_model_with_another_tokenizer_scores_the_text(server: Server, models: Path) -> None:
    prompt, response = [40, 41, 42], [50, 51]
    answer = server.post("/v1/rewards", {"model": "text", "prompt": prompt, "responses": [response]}).json()
    expected = float(text_rewards(models / "text", models)([[*prompt, *response]]))
    assert answer["data"][0]["reward"] == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "third"}, "no reward model 'third'"),
        ({"responses": [[]]}, "responses.0: is empty"),
        ({"responses": []}, "responses"),
        ({"responses": [[9999]]}, "outside of 0 to"),
        ({"responses": [[5] * 600]}, "reads at most 512"),
        ({"messages": [{"role": "user", "content": "x"}]}, "either prompt or messages"),
        ({"prompt": None}, "either prompt or messages"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_bad_request_is_refused_with_the_reason(server: Server, change: dict[str, Any], says: str) -> None:
    body = {"model": "first", "prompt": [5, 6], "responses": [[7, 8]], **change}
    response = server.post("/v1/rewards", body)
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]


def test_a_reward_that_is_not_a_number_is_an_error_not_a_value(server: Server) -> None:
    response = server.post("/v1/rewards", {"model": "broken", "prompt": [5, 319], "responses": [[7, 8]]})
    assert response.status_code == 500
    assert "'broken'" in response.json()["error"]["message"]
    sound = server.post("/v1/rewards", {"model": "broken", "prompt": [5, 6], "responses": [[7, 8]]})
    assert sound.status_code == 200


class TogetherOnly:
    """An engine whose scores come when as many responses as expected are being scored."""

    def __init__(self, expected: int) -> None:
        self.model_config = SimpleNamespace(get_vocab_size=lambda: VOCABULARY)
        self.tokenizer = None
        self._all = asyncio.Barrier(expected)

    async def score_prefixes(self, model: Any, prompt: list[int], response: list[int], source: Any) -> list[float]:
        await asyncio.wait_for(self._all.wait(), 10)
        return [float(token) for token in response]

    async def score_answers(
        self, model: Any, prompt: list[int], responses: list[list[int]], source: Any
    ) -> tuple[list[float], int]:
        return [rewards[-1] for rewards in [await self.score_prefixes(model, prompt, responses[0], source)]], 0


@pytest.mark.parametrize("prefixes", [True, False])
@pytest.mark.parametrize(("kind", "at_once"), [("head", 7), ("causal", 1)])
def test_a_head_scores_all_responses_together_and_keeps_their_order(
    rng: random.Random, kind: str, at_once: int, prefixes: bool
) -> None:
    responses = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 5))] for _ in range(7)]
    request = RewardsRequest(model="m", prompt=[5], responses=responses, prefixes=prefixes)
    engine: Any = TogetherOnly(at_once)
    body = asyncio.run(scoring._score_responses(engine, LoadedModel("m", kind, 512), request, [5], None))
    assert [entry["reward"] for entry in body["data"]] == [float(response[-1]) for response in responses]
    assert [entry["index"] for entry in body["data"]] == list(range(7))
    for entry, response in zip(body["data"], responses, strict=True):
        assert entry.get("prefix_rewards") == ([float(token) for token in response] if prefixes else None)
    assert body["usage"]["total_tokens"] == sum(map(len, responses)) + 7
