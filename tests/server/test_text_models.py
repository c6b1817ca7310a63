"""Reward models that read text: decoding and `/v1/rewards` give them the form that they were trained on."""

import asyncio
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from steersman.guidance.text_form import Source
from steersman.server.app import _measure_prompts
from steersman.server.budget import CacheBudget
from steersman.server.engine import TEXT_TOKENS_PER_CALL, GuidedEngine
from steersman.server.protocol import GuidedCompletionRequest
from steersman.server.registry import LoadedModel, Registry
from tests.conftest import ADMIN_KEY
from tests.server.polling import assert_no_block_stays_in_use
from tests.support.foreign import CHAT_TEMPLATE, chat_reward, save_foreign, save_pair_encoder, text_reward
from tests.support.metrics import Series, growth, read_metrics, total
from tests.support.server import Server

NEAR = {"rel": 1e-6, "abs": 5e-6}
"""Candidates are scored in one padded batch, which rounds sums in another order than one text alone does."""
LOADED = ("foreign", "strict", "bare", "encoder")
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHAT_TEMPLATE
SYSTEM = {"role": "system", "content": "be brief"}
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
    """The shared server with `foreign` (a chat template), `strict` (one that takes no system message, and a window of
    64), `bare` (none) and `encoder` (two segments) loaded."""
    save_foreign(models / "foreign")
    save_foreign(models / "strict", seed=24, template=STRICT, window=64)
    save_foreign(models / "bare", seed=23, template=None)
    save_pair_encoder(models / "encoder")
    for name in LOADED:
        _admin(server, "load", {"kind": "reward_model", "name": name, "path": name})
    yield server
    for name in LOADED:
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


GUIDANCES = {
    "token by token": {"method": "pargs", "reward_model": "strict", "top_k": 3},
    "samples": {"method": "best_of_n", "reward_model": "strict", "n": 2},
}


@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_messages_that_the_models_template_refuses_are_refused_before_anything_is_decoded(
    served: Server, guidance: dict[str, Any], stream: bool
) -> None:
    before = read_metrics(served)
    refused = _chat(served, [SYSTEM, *QUESTION], "strict", guidance=guidance, stream=stream)
    scored = served.post("/v1/rewards", {"model": "strict", "messages": [SYSTEM, *QUESTION], "responses": ["x"]})
    for response in (refused, scored):
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == "messages"
        words = ("messages: ", "reward model 'strict'", "no system here", "--reward-template strict=raw")
        assert all(word in error["message"] for word in words), error
    _assert_refused(growth(before, read_metrics(served)), "unsupported", 2)
    assert _chat(served, QUESTION, "strict", guidance=guidance).status_code == 200


@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_prompt_that_fills_the_models_window_is_refused_before_anything_is_decoded(
    served: Server, models: Path, guidance: dict[str, Any], stream: bool
) -> None:
    """Though the base model's tokens would fit: it writes this text in half as many."""
    text = "a kettle, a lamp and two chairs were sent to the wrong house on friday morning"
    length = len(AutoTokenizer.from_pretrained(models / "strict")(text)["input_ids"])
    ids = AutoTokenizer.from_pretrained(models / "base")(text)["input_ids"]
    assert len(ids) + 9 < 64 <= length
    before = read_metrics(served)
    fields = {"model": "base", "max_tokens": 3, "guidance": guidance, "stream": stream}
    prompts: list[Any] = [text, ["hello", text], ids, [[7], ids]]
    responses = [
        ("messages", _chat(served, [{"role": "user", "content": text}], "strict", guidance=guidance, stream=stream)),
        *(("prompt", served.post("/v1/completions", {**fields, "prompt": prompt})) for prompt in prompts),
        ("prompt", served.post("/v1/rewards", {"model": "strict", "prompt": text, "responses": ["x"]})),
    ]
    for field, response in responses:
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert "reward model 'strict'" in error["message"]
        assert "at most 64" in error["message"]
        assert error["param"] in (field, "responses.0")
    _assert_refused(growth(before, read_metrics(served)), "too_long", len(responses))


@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_answer_that_outgrows_the_models_window_ends_by_its_own_fault(
    served: Server, models: Path, guidance: dict[str, Any], stream: bool
) -> None:
    """The base model is made to write a token that is many of the reward model's: that is known once it is decoded."""
    bias = {str(_longest_token(models)): 100}
    neighbours = [
        {"model": "base", "prompt": "the lamp", "max_tokens": 40, "temperature": 0, "ignore_eos": True, **fields}
        for fields in (
            {},
            {"guidance": {"method": "pargs", "reward_model": "first"}},
            {"guidance": {"method": "pargs", "reward_model": "foreign", "top_k": 2}},
        )
    ]
    alone = [served.post("/v1/completions", body).json()["choices"][0]["text"] for body in neighbours]
    before = read_metrics(served)
    with ThreadPoolExecutor() as pool:
        beside = [pool.submit(served.post, "/v1/completions", body) for body in neighbours]
        fields = {"guidance": guidance, "logit_bias": bias, "max_tokens": 30, "stream": stream}
        response = _chat(served, QUESTION, "strict", **fields)
        texts = [future.result().json()["choices"][0]["text"] for future in beside]
    assert response.status_code == (200 if stream else 400), response.text
    events = [line for line in response.text.splitlines() if line.startswith('data: {"error"')]
    error = json.loads(events[0].removeprefix("data: ") if stream else response.text)["error"]
    assert (error["code"], error["type"], error["param"]) == (400, "BadRequestError", "max_tokens")
    words = ("reward model 'strict' reads at most 64 tokens, the text has", "ask for fewer tokens")
    assert all(word in error["message"] for word in words), error
    assert texts == alone
    _assert_refused(growth(before, read_metrics(served)), "too_long", 1)
    assert_no_block_stays_in_use(served)


def test_a_text_that_just_fits_is_scored_under_guidance(served: Server, models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "strict")
    text = "the lamp"
    while len(tokenizer(f"{text}, a")["input_ids"]) < 64:
        text += ", a"
    fields = {"echo": True, "logprobs": 1, "max_tokens": 0}
    choice = served.complete(text, GUIDANCES["token by token"], **fields)["choices"][0]
    assert all(isinstance(value, float) for value in choice["logprobs"]["token_logprobs"][1:])


def _longest_token(models: Path) -> int:
    """The token of the base's that is most of the model's."""
    base, model = (AutoTokenizer.from_pretrained(models / name) for name in ("base", "strict"))
    return max(range(2, len(base)), key=lambda token: len(model.tokenize(base.decode([token]))))


def _assert_refused(grown: Series, reason: str, times: int) -> None:
    """Counted as the request's own fault: neither the server's nor a model's."""
    assert total(grown, "steersman_refusals_total") == total(grown, "steersman_refusals_total", reason=reason) == times
    assert total(grown, "steersman_errors_total") == total(grown, "steersman_model_failures_total") == 0
    assert total(grown, "steersman_requests_total", outcome="failed") == 0


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


@pytest.mark.parametrize("prompt", ["the lamp", [5, 6], ["a", "b"]])
def test_a_request_without_such_a_model_is_not_measured(prompt: Any) -> None:
    """No call to a worker, between whose steps it would have to wait."""
    registry = Registry({"quick": LoadedModel("quick", "causal", 512, vocabulary=320)})
    guidance = {"method": "pargs", "reward_model": "quick"}
    request = GuidedCompletionRequest(model="base", prompt=prompt, guidance=guidance)
    request.choose_guidance(registry)
    engine: Any = None
    asyncio.run(_measure_prompts(engine, request))


@pytest.mark.parametrize(
    ("prompt", "source"),
    [
        ([320], None),
        ([-1], None),
        ([5] * 257, None),
        ([], Source(text="x" * 2561)),
        ([], Source(({"content": "x" * 2561},))),
    ],
)
def test_a_prompt_that_the_base_cannot_read_is_left_to_vllm(prompt: list[int], source: Source | None) -> None:
    """A worker would read all of it while decoding waits."""
    engine = GuidedEngine.__new__(GuidedEngine)
    config = SimpleNamespace(max_model_len=256, get_vocab_size=lambda: 320)
    renderer = SimpleNamespace(tokenizer=SimpleNamespace(max_chars_per_token=10))
    engine._engine = SimpleNamespace(model_config=config, renderer=renderer)  # type: ignore[assignment]
    model = LoadedModel("slow", "text", 512)
    assert asyncio.run(engine.measure_prompt([model], prompt, source, "prompt")) == {}
