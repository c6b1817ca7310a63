"""An answer put together from samples, block by block, is the answer that vLLM gives to the same request at once.

Samples from the single most likely token are all equal, so that a search has nothing to choose, and every field of its
answer must be that of the plain request. Among samples that differ, the fields of the chosen one agree with each other.
"""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from transformers import AutoTokenizer

from steersman.server.answers import Answer
from steersman.server.vllm import (
    CompletionOutput,
    EngineCoreOutput,
    EngineCoreRequest,
    FinishReason,
    LogprobsLists,
    OutputProcessor,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from tests.support.server import Server
from tests.support.tiny import END, VOCABULARY, build_tokenizer

CASES = 12
PROMPT = {"/v1/completions": "prompt", "/v1/chat/completions": "messages"}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", PROMPT)
@pytest.mark.parametrize("method", ["best_of_n", "blockwise"])
def test_an_answer_without_choice_is_the_plain_one(
    server: Server, rng: random.Random, method: str, path: str, stream: bool
) -> None:
    for _ in range(CASES):
        body = _random_request(server, rng, path)
        guidance: dict[str, Any] = {"method": method, "reward_model": "first", "n": rng.randint(2, 3)}
        if method == "blockwise":
            guidance |= {"block": rng.choice([1, 2, 3, 5, 8, 40]), "trace": True}
        print(json.dumps({**body, "guidance": guidance}))
        plain, plain_usage = _answer(server, path, body, stream)
        found, usage = _answer(server, path, {**body, "guidance": guidance}, stream)
        report = found.pop("guidance")
        _assert_equal(found, plain)
        tokens, block = plain_usage["completion_tokens"], guidance.get("block", body["max_tokens"])
        assert report["tokens"] == tokens
        assert report["kl_steering"] == report["kl"]
        assert report["kl_truncation"] == report["unreadable_samples"] == 0
        sizes = [step["samples"][0]["tokens"] for step in report.get("trace", ())]
        assert set(sizes[:-1]) <= {block}, "no block but the last ends early"
        generated = usage["completion_tokens"] / guidance["n"]
        if isinstance(plain["stop_reason"], str) and tokens > block:
            # A stop string that lies over a border is found behind it, once the block is there.
            assert tokens <= generated <= -(-tokens // block) * block
        else:
            assert generated == tokens


@pytest.mark.parametrize("method", ["best_of_n", "blockwise"])
def test_text_tokens_and_reward_are_of_one_answer(
    server: Server, models: Path, rng: random.Random, method: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    ascii_tokens = [token for token in range(2, VOCABULARY) if tokenizer.decode([token]).isascii()]
    for _ in range(CASES):
        prompt, skipped = rng.choices(ascii_tokens, k=rng.randint(4, 30)), rng.random() < 0.5
        body = {
            "allowed_token_ids": [END, *ascii_tokens],
            **{"max_tokens": 24, "stop": [rng.choice("aeiou"), " t"], "min_tokens": rng.choice([0, 0, 6])},
            **{"return_token_ids": True, "logprobs": 0, "ignore_eos": True, "logit_bias": {str(END): 2}},
            **{"skip_special_tokens": skipped, "include_stop_str_in_output": rng.random() < 0.5},
        }
        guidance: dict[str, Any] = {"method": method, "reward_model": "first", "n": 3, "trace": True}
        if method == "blockwise":
            guidance["block"] = rng.randint(1, 6)
        print(json.dumps({"prompt": prompt, **body, "guidance": guidance}))
        choice = server.complete(prompt, guidance, **body)["choices"][0]
        tokens, report = choice["token_ids"], choice["guidance"]
        before = len(tokenizer.decode(prompt, skip_special_tokens=skipped))
        texts = [
            tokenizer.decode([*prompt, *tokens[:n]], skip_special_tokens=skipped)[before:]
            for n in range(len(tokens) + 1)
        ]
        least = body["min_tokens"]
        assert not any(stop in texts[-2][len(texts[least]) :] for stop in body["stop"]), "it had ended before"
        expected = texts[-1]
        if choice["finish_reason"] == "stop":
            place = expected.index(choice["stop_reason"], max(0, len(texts[-2]) + 1 - len(choice["stop_reason"])))
            expected = expected[: place + len(choice["stop_reason"]) * body["include_stop_str_in_output"]]
        assert choice["text"] == expected
        assert len(choice["logprobs"]["tokens"]) == len(tokens) == report["tokens"]
        scored = server.post("/v1/rewards", {"model": "first", "prompt": prompt, "responses": [tokens]}).json()
        assert report["rewards"]["first"] == pytest.approx(scored["data"][0]["reward"], rel=1e-4, abs=1e-4)
        picked = [step["samples"][step["chosen"]] for step in report["trace"]]
        assert picked[-1]["reward"] == report["rewards"]["first"]
        assert sum(sample["tokens"] for sample in picked) == len(tokens)


@pytest.mark.parametrize("listed", [{"logprobs": 0}, {"logprobs": 3}, {"logprobs": -1}, {"logprob_token_ids": [9, 4]}])
@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
def test_logprobs_and_text_are_what_the_processor_makes_of_the_sampler(
    rng: random.Random, listed: dict[str, Any], slow: bool
) -> None:
    tokens = _random_prompt(rng)
    params = SamplingParams(**listed, max_tokens=len(tokens), stop=["never"], output_kind=RequestOutputKind.FINAL_ONLY)
    plain = OutputProcessor(_tokenizer(slow), log_stats=False)
    plain.add_request(_core_request(params), None)
    steps = [_sample_logprobs(rng, params, token) for token in tokens]
    for n, (token, lists) in enumerate(zip(tokens, steps, strict=True), start=1):
        finish = FinishReason.LENGTH if n == len(tokens) else None
        outputs = plain.process_outputs([EngineCoreOutput("r", [token], lists, finish_reason=finish)]).request_outputs
    expected = outputs[0].outputs[0]

    answer, found = _begin(params, slow), None
    place = 0
    while place < len(tokens):
        end = min(len(tokens), place + rng.randint(1, 5))
        # The decoded tokens of a block that begins within a character are wrong.
        logprobs = [
            {t: replace(entry, decoded_token="?") for t, entry in position.items()}
            for position in expected.logprobs[place:end]
        ]
        sample = CompletionOutput(0, "", tokens[place:end], None, logprobs, finish_reason="length")
        assert answer.trim(sample).token_ids == sample.token_ids
        found = answer.extend(sample)
        assert answer.finished == (end == len(tokens)) == (found is not None)
        place = end
    (choice,) = found.outputs
    assert choice == expected
    assert [list(position) for position in choice.logprobs] == [list(position) for position in expected.logprobs]


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
def test_trimming_leaves_the_answer_as_it_is(rng: random.Random, slow: bool) -> None:
    tokenizer = _tokenizer(slow)
    params = SamplingParams(max_tokens=99, stop=["zz"], output_kind=RequestOutputKind.DELTA)
    first, second = (tokenizer.encode(text) for text in ("hello ü", "é the lamp"))
    # A block ends within a character, and one token before the stop string is complete.
    head, rest = [*first, second[0]], [*second[1:], *tokenizer.encode("z")]
    trimmed, untouched = _begin(params, slow), _begin(params, slow)
    texts = []
    for answer in (trimmed, untouched):
        shown = answer.extend(_sample(head))
        if answer is trimmed:
            for _ in range(3):
                discarded = answer.trim(_sample([*rest, *tokenizer.encode("z"), *_random_prompt(rng)]))
                assert discarded.token_ids == [*rest, *tokenizer.encode("z")]
                assert (discarded.finish_reason, discarded.stop_reason) == ("stop", "zz")
        texts.append(shown.outputs[0].text + answer.extend(_sample(rest)).outputs[0].text)
        assert not answer.finished
    assert texts[0] == texts[1] == "hello üé the lamp"


def _tokenizer(slow: bool) -> Any:
    """Of the kind that vLLM decodes in Rust, or of the one that it decodes in Python."""
    tokenizer = build_tokenizer()
    return SlowTokenizer(tokenizer) if slow else tokenizer


class SlowTokenizer:
    """A tokenizer that is none of transformers' fast ones."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)


def _core_request(params: SamplingParams) -> EngineCoreRequest:
    return EngineCoreRequest("r", [5, 6], None, params, None, 0.0, None, None, None, external_req_id="r")


def _begin(params: SamplingParams, slow: bool) -> Answer:
    return Answer(_tokenizer(slow), "r", params, RequestOutput("r", None, [5, 6], None, [], False))


def _sample(tokens: list[int]) -> CompletionOutput:
    return CompletionOutput(0, "", tokens, None, None, finish_reason="length")


def _sample_logprobs(rng: random.Random, params: SamplingParams, token: int) -> LogprobsLists:
    """What vLLM's sampler returns for a token."""
    logprobs = np.log(np.random.default_rng(rng.randrange(2**31)).dirichlet(np.ones(VOCABULARY)))
    if rng.random() < 0.5:
        best = int(logprobs.argmax())
        logprobs[[token, best]] = logprobs[[best, token]]
    order = np.argsort(-logprobs)
    listed = params.logprob_token_ids or order[: params.logprobs if params.logprobs != -1 else VOCABULARY]
    ids = np.array([[token, *listed]])
    return LogprobsLists(ids, logprobs[ids], np.array([int((logprobs >= logprobs[token]).sum())]))


def _random_request(server: Server, rng: random.Random, path: str) -> dict[str, Any]:
    """Any request that vLLM decodes one way, with stops that its answer holds."""
    tokens = rng.randint(2, 24)
    prompt: Any = _random_prompt(rng)
    if path == "/v1/chat/completions":
        prompt = [{"role": "user", "content": " ".join(rng.sample(["kettle", "lamp", "über", "town", "fox"], 3))}]
    body: dict[str, Any] = {
        **{"model": "base", PROMPT[path]: prompt, "temperature": 1, "top_k": 1, "max_tokens": tokens},
        **{"return_token_ids": True, "ignore_eos": rng.random() < 0.5},
        **{"skip_special_tokens": rng.random() < 0.5, "spaces_between_special_tokens": rng.random() < 0.5},
        **{"include_stop_str_in_output": rng.random() < 0.5, "min_tokens": rng.choice([0, 0, rng.randint(1, tokens)])},
    }
    if rng.random() < 0.7:
        bias = {str(token): rng.uniform(-3, 6) for token in rng.sample(range(2, VOCABULARY), 30)}
        body["logit_bias"] = bias | {str(END): rng.choice([0, 2, 5])}
    if rng.random() < 0.7:
        body["repetition_penalty"] = rng.uniform(1.0, 2.5)
    if rng.random() < 0.5:
        body["logprobs"] = True if path == "/v1/chat/completions" else rng.randint(0, 4)
        if body["logprobs"] is True and rng.random() < 0.7:
            body["top_logprobs"] = rng.randint(0, 4)
    elif path == "/v1/completions":
        body["echo"] = rng.random() < 0.5
    unstopped, _ = _answer(server, path, {**body, "echo": False, "ignore_eos": True, "min_tokens": 0}, False)
    text = unstopped["text"] if "text" in unstopped else unstopped["message"]["content"]
    if text and rng.random() < 0.7:
        body["stop"] = [_random_part(rng, text) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.4:
        body["stop_token_ids"] = rng.sample(unstopped["token_ids"], 1)
    return body


def _random_prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(2, 300) for _ in range(rng.randint(4, 30))]


def _random_part(rng: random.Random, text: str) -> str:
    start = rng.randrange(len(text))
    return text[start : start + rng.randint(1, 8)]


def _answer(server: Server, path: str, body: dict[str, Any], stream: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The one choice of an answer and the usage; of a stream put together from its pieces."""
    if not stream:
        response = server.post(path, body)
        assert response.status_code == 200, response.text
        whole = response.json()
        return whole["choices"][0], whole["usage"]
    choice: dict[str, Any] = {}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{server.url}{path}", json={**body, **options}, headers=server.headers, timeout=60) as r:
        events = [line.removeprefix("data: ") for line in r.iter_lines() if line]
    chunks = [json.loads(event) for event in events if event != "[DONE]"]
    for piece in (piece for chunk in chunks for piece in chunk["choices"]):
        _append(choice, piece)
    return choice, chunks[-1]["usage"]


def _append(whole: Any, piece: dict[str, Any]) -> None:
    for name, value in piece.items():
        if value is None or name == "index":
            whole.setdefault(name, value)
        elif name == "guidance":
            whole[name] = value
        elif isinstance(value, dict):
            if whole.get(name) is None:
                whole[name] = {}
            _append(whole[name], value)
        else:
            whole[name] = value if whole.get(name) is None or name == "role" else whole[name] + value


def _assert_equal(found: Any, plain: Any) -> None:
    """Exactly, but for what float32 leaves open."""
    assert type(found) is type(plain)
    if isinstance(found, dict):
        assert set(found) == set(plain)
        for name in found:
            _assert_equal(found[name], plain[name])
    elif isinstance(found, list):
        assert len(found) == len(plain)
        for one, other in zip(found, plain, strict=True):
            _assert_equal(one, other)
    elif isinstance(found, float):
        assert found == pytest.approx(plain, abs=1e-3)
    else:
        assert found == plain
