"""The demo server, with the README's own prompt: what users have met with answers rightly."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from rich.console import Console

from steersman.demo import serving
from tests.support.server import free_port

P = "Customer: Hi, this is not the watch I ordered. Can you help me? Maria\nAgent:"
HELLO, END = 295, 1
MESSAGES = [{"role": "user", "content": "Hi, this is not the watch I ordered. Can you help me? Maria"}]
HELPFUL = {"method": "pargs", "reward_model": "helpful", "beta": 2.0}
BY_POLICY = [
    {"method": "mixed", "policy": "dpo", "mix": 1.0},
    {"method": "mixed", "policy": "dpo", "mix": 1.5},
    {"method": "length_control", "policy": "dpo", "length": 32},
    {"method": "kl_threshold", "policy": "dpo", "threshold": 0.0},
    {"method": "product", "policies": {"dpo": 1.0}},
    {"method": "product", "policies": {"base": -1.0, "dpo": 2.0}},
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(free_port(), [], Console()) as (_, address):
        yield address


def test_a_ban_or_a_bias_acts_once_whatever_the_coefficients(url: str) -> None:
    for guidance in (*BY_POLICY, HELPFUL):
        plain = _complete(url, guidance, max_tokens=4)
        first = plain["token_ids"][0]
        assert _complete(url, guidance, max_tokens=4, logit_bias={str(first): -100})["token_ids"][0] != first
        assert _complete(url, guidance, max_tokens=1, logit_bias={str(HELLO): 100})["token_ids"] == [HELLO]
        banned = _complete(url, guidance, max_tokens=40, logit_bias={str(HELLO): -100, str(END): -100})["token_ids"]
        assert len(banned) == 40
        assert not {HELLO, END} & set(banned)


def test_an_affine_shift_of_the_reward_changes_no_text_under_a_repetition_penalty(url: str) -> None:
    def answer(shift: float) -> str:
        term = {"model": "helpful", "transform": "affine", "scale": 1.0, "shift": shift}
        guidance = {"method": "pargs", "rewards": [term], "beta": 2.0}
        return str(_complete(url, guidance, max_tokens=30, repetition_penalty=1.3)["text"])

    assert answer(0.0) == answer(7.0) == answer(-5000.0)


def test_parameters_that_float32_cannot_hold_are_refused_by_name(url: str) -> None:
    for term in (
        {"model": "helpful", "transform": "log_sigmoid", "reference": 1e39},
        {"model": "helpful", "transform": "affine", "shift": -1e308},
        {"model": "helpful", "transform": "affine", "scale": 1e38},
    ):
        name = next(name for name in term if name not in ("model", "transform"))
        error = _refused(url, {"method": "pargs", "rewards": [term]})
        assert f"guidance.rewards.0.{name}" in error["message"]
    for guidance in ({**HELPFUL, "kl_budget": 1e39}, {**HELPFUL, "gate": {"entropy_above": 1e39}}):
        assert "less than or equal to 1000000" in _refused(url, guidance)["message"]


def test_the_likelihood_of_a_text_depends_on_the_guidance(url: str) -> None:
    text = f"{P} Hello Maria, I am sorry."
    scored = {}
    for model in ("demo", "demo:dpo-mix", "demo:helpful"):
        body = {"model": model, "prompt": text, "echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0}
        choice = _post(url, "/v1/completions", body)["choices"][0]
        assert choice["text"] == text
        scored[model] = choice["logprobs"]["token_logprobs"]
    plain, mixed, helpful = scored.values()
    assert plain[0] is mixed[0] is None
    assert len(plain) == len(mixed) == len(helpful)
    assert abs(sum(plain[1:]) - sum(mixed[1:])) > 0.5
    refusal = httpx.post(
        f"{url}/v1/completions",
        json={"model": "demo:best-of-4", "prompt": text, "echo": True, "logprobs": 1, "max_tokens": 0},
        timeout=60,
    )
    assert refusal.status_code == 400


def test_keeping_the_top_k_is_not_counted_as_steering(url: str) -> None:
    report = _complete(url, {**HELPFUL, "beta": 0.0, "top_k": 3}, max_tokens=40, temperature=1.0, seed=4)["guidance"]
    assert report["kl"] == pytest.approx(report["kl_truncation"], abs=1e-3)
    assert report["kl_truncation"] > 0
    assert report["kl_steering"] == pytest.approx(0.0, abs=1e-3)
    whole = _complete(url, {"method": "pargs", "reward_model": "swift", "beta": 1.0, "top_k": None}, max_tokens=20)
    assert whole["guidance"]["kl_truncation"] == 0.0
    assert whole["guidance"]["guided_tokens"] == 20
    assert "guidance.top_k" in _refused(url, {**HELPFUL, "top_k": None})["message"]


def test_guidance_in_a_wrong_place_is_never_passed_over(url: str) -> None:
    for misplaced in (
        {"extra_body": {"guidance": HELPFUL}},
        {"vllm_xargs": {"guidance": "x"}},
        {"vllm_xargs": {"steersman": "x"}},
        {"metadata": {"guidance": "helpful"}},
        {"guidence": HELPFUL},
    ):
        for path, content in (("/v1/completions", {"prompt": P}), ("/v1/chat/completions", {"messages": MESSAGES})):
            body = {"model": "demo", **content, "max_tokens": 2, **misplaced}
            response = httpx.post(f"{url}{path}", json=body, timeout=60)
            assert response.status_code == 400, (path, misplaced, response.text)
    integral = _complete(url, {**HELPFUL, "top_k": 10.0}, max_tokens=2)
    assert integral["guidance"]["tokens"] == 2
    assert "guidance.length" in _refused(url, {**BY_POLICY[2], "length": 2**70})["message"]


def test_presets_names_are_models_wherever_models_are_named(url: str) -> None:
    preset = "demo:dpo-mix"
    assert httpx.get(f"{url}/v1/models/{preset}", timeout=60).json()["id"] == preset
    tokens = _post(url, "/tokenize", {"model": preset, "prompt": P})["tokens"]
    assert _post(url, "/detokenize", {"model": preset, "tokens": tokens})["prompt"] == P
    counted = _post(url, "/v1/messages/count_tokens", {"model": preset, "max_tokens": 1, "messages": MESSAGES})
    assert counted["input_tokens"] > 0


def test_rewards_of_a_finished_text_do_not_depend_on_how_it_is_written(url: str) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    answer = " Hello Maria, I am sorry."
    rewards = [
        _post(url, "/v1/rewards", {"model": "helpful", "messages": messages, "responses": [response]})["data"][0][
            "reward"
        ]
        for messages in (MESSAGES, parts)
        for response in (answer, f"{answer}<eos>")
    ]
    assert rewards == pytest.approx([rewards[0]] * 4, abs=1e-6)


def test_a_stop_string_cuts_every_part_of_a_blockwise_answer(url: str) -> None:
    guidance = {"method": "blockwise", "reward_model": "helpful", "n": 2, "block": 8}
    choice = _complete(url, guidance, max_tokens=60, temperature=1.0, top_k=1, stop=[" the"], logprobs=0)
    assert " the" not in choice["text"]
    assert len(choice["token_ids"]) == choice["guidance"]["tokens"] == len(choice["logprobs"]["token_logprobs"])
    plain = _complete(url, None, max_tokens=60, temperature=1.0, top_k=1, stop=[" the"])
    assert (choice["text"], choice["token_ids"]) == (plain["text"], plain["token_ids"])


def _complete(url: str, guidance: dict[str, Any] | None, **fields: Any) -> dict[str, Any]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    extra = {"return_token_ids": True, "temperature": 0, **fields}
    if guidance is not None:
        extra["guidance"] = guidance
    choice: dict[str, Any] = client.completions.create(model="demo", prompt=P, extra_body=extra).choices[0].model_dump()
    return choice


def _refused(url: str, guidance: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(
        f"{url}/v1/completions", json={"model": "demo", "prompt": P, "guidance": guidance}, timeout=60
    )
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def _post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(f"{url}{path}", json=body, timeout=120)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer
