"""`POST /v1/rewards`: the reward of finished texts is the reward model's own."""

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.support.oracle import causal_rewards, text_rewards
from tests.support.random_input import random_prompts
from tests.support.server import Server
from tests.support.tiny import END


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
