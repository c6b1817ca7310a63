"""Reward models that read text: decoding and `/v1/rewards` give them the form that they were trained on."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from steersman.server.budget import CacheBudget
from steersman.server.engine import TEXT_TOKENS_PER_CALL, GuidedEngine
from steersman.server.registry import LoadedModel
from tests.conftest import ADMIN_KEY
from tests.support.foreign import chat_reward, save_foreign, save_pair_encoder, text_reward
from tests.support.server import Server

NEAR = {"rel": 1e-6, "abs": 5e-6}
"""Candidates are scored in one padded batch, which rounds sums in another order than one text alone does."""
QUESTION = [{"role": "user", "content": "where is the lamp?"}]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": QUESTION,
    "several turns": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi, ada"},
        {"role": "user", "content": "and the kettle?"},
    ],
    "content parts": [
        {"role": "user", "content": [{"type": "text", "text": "the quick"}, {"type": "text", "text": "brown fox"}]}
    ],
    "tool calls": [
        {"role": "user", "content": "what is the weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Bergen"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
    ],
}


@pytest.fixture(scope="module")
def served(server: Server, models: Path) -> Iterator[Server]:
    """The shared server with `foreign` (a chat template), `bare` (none) and `encoder` (two segments) loaded."""
    save_foreign(models / "foreign")
    save_foreign(models / "bare", seed=23, template=None)
    save_pair_encoder(models / "encoder")
    for name in ("foreign", "bare", "encoder"):
        _admin(server, "load", {"kind": "reward_model", "name": name, "path": name})
    yield server
    for name in ("foreign", "bare", "encoder"):
        _admin(server, "unload", {"name": name})


def _admin(server: Server, change: str, body: dict[str, Any]) -> None:
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    response = httpx.post(f"{server.url}/v1/admin/models/{change}", json=body, headers=headers, timeout=120)
    assert response.status_code == 200, response.text


def _plain(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As a chat template takes them."""
    plain = []
    for message in messages:
        content = message["content"]
        text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
        calls = [
            {**call, "function": {"name": "weather", "arguments": {"town": "Bergen"}}}
            for call in message.get("tool_calls", [])
        ]
        plain.append({"role": message["role"], "content": text, **({"tool_calls": calls} if calls else {})})
    return plain


def _chat(server: Server, messages: Any, model: str, **fields: Any) -> Any:
    guidance = {"method": "pargs", "reward_model": model, "beta": 1, "top_k": 4, "trace": True}
    return server.post(
        "/v1/chat/completions",
        {"model": "base", "messages": messages, "max_tokens": 5, "guidance": guidance, "temperature": 1, **fields},
    )


def _candidates(trace: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Each candidate's answer as text, and its reward."""
    answer = ""
    for step in trace:
        for candidate in step["candidates"]:
            if candidate["token_id"] > 1 and "\ufffd" not in answer + candidate["token"]:
                yield answer + candidate["token"], candidate["reward"]
        answer += step["token"] if step["token_id"] > 1 else ""


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_a_chat_is_read_through_the_models_own_template(served: Server, models: Path, case: str) -> None:
    messages = CONVERSATIONS[case]
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    answer = _chat(served, messages, "foreign", seed=seed)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    compared = list(_candidates(choice["guidance"]["trace"]))
    assert compared
    for text, reward in compared:
        assert reward == pytest.approx(chat_reward(models / "foreign", _plain(messages), text), **NEAR)
    tokens = [step["token_id"] for step in choice["guidance"]["trace"]]
    body = {"model": "foreign", "messages": messages, "responses": [tokens], "prefixes": True}
    scored = served.post("/v1/rewards", body)
    assert scored.status_code == 200, scored.text
    entry = scored.json()["data"][0]
    assert entry["reward"] == pytest.approx(choice["guidance"]["rewards"]["foreign"], **NEAR)
    single = served.post("/v1/rewards", {**body, "prefixes": False}).json()["data"][0]
    assert single["reward"] == pytest.approx(entry["reward"], **NEAR)
    for step, reward in zip(choice["guidance"]["trace"], entry["prefix_rewards"], strict=True):
        chosen = next(c for c in step["candidates"] if c["token_id"] == step["token_id"])
        assert reward == pytest.approx(chosen["reward"], **NEAR)


def test_an_encoder_reads_question_and_answer_as_two_segments(served: Server, models: Path) -> None:
    trace = _chat(served, QUESTION, "encoder").json()["choices"][0]["guidance"]["trace"]
    for text, reward in _candidates(trace):
        assert reward == pytest.approx(text_reward(models / "encoder", "where is the lamp?", text), **NEAR)
    body = {"model": "encoder", "messages": QUESTION, "responses": ["in the old town"]}
    reward = served.post("/v1/rewards", body).json()["data"][0]["reward"]
    assert reward == pytest.approx(text_reward(models / "encoder", "where is the lamp?", "in the old town"), **NEAR)


def test_a_prompt_of_text_is_read_as_it_is(served: Server, models: Path) -> None:
    prompt = "the lamp stood in the"
    for name, pair in (("foreign", False), ("bare", False), ("encoder", True)):
        guidance = {"method": "pargs", "reward_model": name, "beta": 1, "top_k": 4, "trace": True}
        choice = served.complete([prompt, prompt], guidance, max_tokens=4)["choices"][1]
        for text, reward in _candidates(choice["guidance"]["trace"]):
            expected = text_reward(models / name, prompt, text) if pair else text_reward(models / name, prompt + text)
            assert reward == pytest.approx(expected, **NEAR)


def test_best_of_n_reads_the_same_form(served: Server, models: Path) -> None:
    guidance = {"method": "best_of_n", "reward_model": "foreign", "n": 2}
    choice = _chat(served, QUESTION, "foreign", guidance=guidance, seed=7).json()["choices"][0]
    expected = chat_reward(models / "foreign", QUESTION, choice["message"]["content"])
    assert choice["guidance"]["rewards"]["foreign"] == pytest.approx(expected, **NEAR)


@pytest.mark.parametrize(("name", "case"), [("bare", "one question"), ("encoder", "several turns")])
def test_a_chat_that_cannot_be_written_is_refused_with_the_flag(served: Server, name: str, case: str) -> None:
    messages = CONVERSATIONS[case]
    scored = served.post("/v1/rewards", {"model": name, "messages": messages, "responses": ["x"]})
    for response in (_chat(served, messages, name), scored):
        assert response.status_code == 400
        assert f"--reward-template {name}=" in response.json()["error"]["message"]


def test_an_end_token_that_is_there_is_not_appended(served: Server) -> None:
    body = {"model": "first", "prompt": "the lamp", "responses": ["fine", "fine<eos>"]}
    plain, ended = served.post("/v1/rewards", body).json()["data"]
    assert plain["tokens"] == ended["tokens"]
    assert plain["reward"] == pytest.approx(ended["reward"], **NEAR)


def test_too_long_a_text_is_refused(served: Server) -> None:
    body = {"model": "encoder", "prompt": "the lamp", "responses": ["ÿ" * 200]}
    response = served.post("/v1/rewards", body)
    assert response.status_code == 400
    assert "at most 256" in response.json()["error"]["message"]


def test_one_call_to_a_worker_reads_a_bounded_number_of_tokens() -> None:
    """Between two calls the engine's steps go on."""
    engine, calls = GuidedEngine.__new__(GuidedEngine), []
    engine.budget = CacheBudget({})

    async def ask(method: str, name: str, prompt: list[int], part: list[int], start: int, source: Any) -> list[float]:
        calls.append((len(part) - start) * (len(prompt) + len(part)))
        return [float(n) for n in range(start, len(part))]

    engine._ask_worker = ask  # type: ignore[method-assign]
    model = LoadedModel("slow", "text", 512)
    rewards = asyncio.run(engine.score_prefixes(model, [5] * 14, [6] * 300))
    assert rewards == [float(n) for n in range(300)]
    assert max(calls) <= TEXT_TOKENS_PER_CALL
