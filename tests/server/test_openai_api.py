"""The OpenAI API with one more field, through the official Python client."""

import json
import random
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from steersman.guidance.request import MAX_TOP_K, METHODS
from tests.support.server import Server
from tests.support.tiny import END

GUIDANCE = {"method": "pargs", "reward_model": "first", "beta": 1.5}
GUIDED = {"guidance": GUIDANCE}
HELLO = [{"role": "user", "content": "hello there"}]
REPORT = {
    *("method", "tokens", "guided_tokens", "interventions", "kl", "kl_truncation", "kl_steering", "rewards"),
    *("reward_model_tokens", "policy_tokens"),
    *("saved_reward_model_tokens", "saved_policy_tokens", "sources", "switches"),
}
SCHEMA = {
    "type": "object",
    "properties": {"done": {"type": "boolean"}, "kind": {"enum": ["kettle", "lamp"]}},
    "required": ["done", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client


def test_every_choice_of_every_prompt_carries_its_report(client: openai.OpenAI, rng: random.Random) -> None:
    prompts = [_prompt(rng) for _ in range(3)]
    answer = client.completions.create(
        model="base", prompt=prompts, n=2, max_tokens=rng.randint(3, 12), extra_body=GUIDED
    )
    assert [choice.index for choice in answer.choices] == list(range(6))
    reports = [_report(choice) for choice in answer.choices]
    assert sum(report["tokens"] for report in reports) == answer.usage.completion_tokens  # type: ignore[union-attr]
    assert answer.usage.prompt_tokens == sum(map(len, prompts))  # type: ignore[union-attr]
    assert len({choice.text for choice in answer.choices}) > 1


def test_reports_belong_to_their_own_prompt(client: openai.OpenAI, rng: random.Random) -> None:
    prompts = [_prompt(rng) for _ in range(4)]
    fields: dict[str, Any] = {"model": "base", "max_tokens": 6, "temperature": 0, "extra_body": GUIDED}
    together = client.completions.create(prompt=prompts, **fields)
    for prompt, choice in zip(prompts, together.choices, strict=True):
        single = client.completions.create(prompt=prompt, **fields).choices[0]
        assert choice.text == single.text
        assert _report(choice)["rewards"]["first"] == pytest.approx(_report(single)["rewards"]["first"], abs=1e-4)


def test_chat_choices_carry_their_reports(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="base", messages=HELLO, n=3, max_tokens=8, extra_body=GUIDED)
    reports = [_report(choice) for choice in answer.choices]
    assert sum(report["tokens"] for report in reports) == answer.usage.completion_tokens  # type: ignore[union-attr]
    assert len({choice.message.content for choice in answer.choices}) > 1


@pytest.mark.parametrize("n", [1, 3])
def test_streamed_completions_are_the_whole_ones(client: openai.OpenAI, rng: random.Random, n: int) -> None:
    fields: dict[str, Any] = {
        **{"model": "base", "prompt": [_prompt(rng), _prompt(rng)], "n": n, "max_tokens": 10},
        **{"seed": rng.randrange(2**31), "extra_body": GUIDED},
    }
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    pieces = [choice for chunk in chunks for choice in chunk.choices]
    for choice in whole.choices:
        mine = [piece for piece in pieces if piece.index == choice.index]
        assert "".join(piece.text for piece in mine) == choice.text
        _check_stream(mine, choice)


@pytest.mark.parametrize("n", [1, 3])
def test_streamed_chat_is_the_whole_one(client: openai.OpenAI, rng: random.Random, n: int) -> None:
    fields: dict[str, Any] = {
        **{"model": "base", "messages": HELLO, "n": n, "max_tokens": 10},
        **{"seed": rng.randrange(2**31), "extra_body": GUIDED},
    }
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    pieces = [choice for chunk in chunks for choice in chunk.choices]
    for choice in whole.choices:
        mine = [piece for piece in pieces if piece.index == choice.index]
        assert "".join(piece.delta.content or "" for piece in mine) == choice.message.content
        _check_stream(mine, choice)


def test_plain_requests_carry_no_report_at_all(server: Server) -> None:
    for path, asked in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": HELLO})):
        body = {"model": "base", "max_tokens": 3, **asked}
        assert '"guidance"' not in server.post(f"/v1/{path}", body).text
        assert '"guidance"' not in server.post(f"/v1/{path}", {**body, "stream": True}).text


def test_plain_greedy_answers_are_the_base_models_own(client: openai.OpenAI, models: Path, rng: random.Random) -> None:
    base = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32).eval()
    for _ in range(4):
        prompt = _prompt(rng)
        answer = client.completions.create(
            model="base", prompt=prompt, max_tokens=20, temperature=0, extra_body={"return_token_ids": True}
        )
        tokens: list[int] = answer.choices[0].token_ids  # type: ignore[attr-defined]
        with torch.inference_mode():
            logits = base(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert bool((chosen >= logits.max(dim=-1).values - 1e-4).all()), (prompt, tokens)
        assert len(tokens) == 20 or tokens[-1] == END


def test_seeds_decide_and_only_they(client: openai.OpenAI, rng: random.Random) -> None:
    prompt = _prompt(rng)
    seeds = [rng.randrange(2**31) for _ in range(4)]

    def ask(seed: int) -> str:
        answer = client.completions.create(model="base", prompt=prompt, max_tokens=16, seed=seed, extra_body=GUIDED)
        return answer.choices[0].text

    first = [ask(seed) for seed in seeds]
    assert [ask(seed) for seed in seeds] == first
    assert len(set(first)) > 1


def test_stop_strings_end_answers_and_reports(client: openai.OpenAI, rng: random.Random) -> None:
    fields: dict[str, Any] = {
        **{"model": "base", "prompt": _prompt(rng), "max_tokens": 60, "seed": rng.randrange(2**31)},
        "extra_body": {**GUIDED, "ignore_eos": True},
    }
    full = client.completions.create(**fields).choices[0]
    stop = next(c for c in full.text[len(full.text) // 3 :] if c.isascii() and c.isprintable())
    stopped = client.completions.create(**fields, stop=[stop]).choices[0]
    streamed = [chunk.choices[0] for chunk in client.completions.create(**fields, stop=stop, stream=True)]
    assert stopped.text == "".join(piece.text for piece in streamed) == full.text[: full.text.index(stop)]
    assert stopped.finish_reason == streamed[-1].finish_reason == "stop"
    assert 0 < _report(stopped)["tokens"] < _report(full)["tokens"] == 60
    assert _report(streamed[-1])["tokens"] == _report(stopped)["tokens"]


def test_logprobs_come_with_guidance(client: openai.OpenAI, rng: random.Random) -> None:
    completion = client.completions.create(
        model="base", prompt=_prompt(rng), max_tokens=5, logprobs=3, extra_body=GUIDED
    ).choices[0]
    assert completion.logprobs is not None
    assert len(completion.logprobs.token_logprobs or ()) == _report(completion)["tokens"]
    assert all(-100 < value <= 0 for value in completion.logprobs.token_logprobs or ())
    chat = client.chat.completions.create(
        model="base", messages=HELLO, max_tokens=5, logprobs=True, top_logprobs=4, extra_body=GUIDED
    ).choices[0]
    assert chat.logprobs is not None
    assert [len(place.top_logprobs) for place in chat.logprobs.content or ()] == [4] * _report(chat)["tokens"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_schemas_are_obeyed_under_guidance(server: Server, rng: random.Random, stream: bool) -> None:
    client, answered = server.client, 0
    response_format = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    for _ in range(6):
        fields: dict[str, Any] = {
            **{"model": "base", "messages": HELLO, "max_tokens": 200, "seed": rng.randrange(2**31)},
            **{"response_format": response_format, "extra_body": GUIDED},
        }
        text, last = _chat(client, fields, stream)
        report = _report(last)
        assert report["guided_tokens"] == report["tokens"] > 0
        # A model of random weights may write white space, which JSON allows, until its tokens are used up.
        if last.finish_reason == "stop":
            thing = json.loads(text)
            assert thing.keys() == {"done", "kind"}
            assert isinstance(thing["done"], bool)
            assert thing["kind"] in ("kettle", "lamp")
            answered += 1
    assert answered >= 3


def test_guidance_tells_what_may_be_asked_for(server: Server) -> None:
    body = httpx.get(f"{server.url}/v1/guidance", timeout=60).json()
    assert body.keys() >= {"methods", "reward_models", "policies", "presets", "limits"}
    assert body["methods"].keys() == METHODS.keys()
    assert set(body["methods"]["pargs"]["properties"]) >= {"method", "reward_model", "rewards", "beta", "top_k"}
    models = {model["name"]: model for model in body["reward_models"]}
    assert {name: (model["kind"], model["window"]) for name, model in models.items()} == {
        **{"first": ("causal", 512), "second": ("causal", 512), "narrow": ("causal", 64), "every": ("vocabulary", 512)},
        **{"broken": ("causal", 512), "text": ("text", 256), "atop": ("head", 256)},
    }
    policies = {policy["name"]: policy for policy in body["policies"]}
    assert {name: (policy["kind"], policy["window"]) for name, policy in policies.items()} == {
        **dict.fromkeys(("expert", "other", "adapter", "ill"), ("policy", 512)),
        **{"slim": ("policy", 64), "tilted": ("policy_head", 256)},
    }
    models |= policies
    assert body["limits"]["top_k"] == MAX_TOP_K
    for name, tokens in body["limits"]["cache_tokens"].items():
        assert tokens == models[name]["cache_blocks"] * models[name]["block_size"] > 0


def test_the_rest_of_the_server_is_there(client: openai.OpenAI, server: Server) -> None:
    assert "base" in [model.id for model in client.models.list()]
    for path in ("/health", "/version", "/metrics"):
        assert httpx.get(f"{server.url}{path}", timeout=60).status_code == 200
    assert client.responses.create(model="base", input="hi", max_output_tokens=16).output_text


def _prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(2, 300) for _ in range(rng.randint(1, 30))]


def _chat(client: openai.OpenAI, fields: dict[str, Any], stream: bool) -> tuple[str, Any]:
    if not stream:
        choice = client.chat.completions.create(**fields).choices[0]
        return choice.message.content or "", choice
    pieces = [chunk.choices[0] for chunk in client.chat.completions.create(**fields, stream=True)]
    return "".join(piece.delta.content or "" for piece in pieces), pieces[-1]


def _check_stream(pieces: list[Any], whole: Any) -> None:
    """The report comes with the finish_reason and not before, and is the whole answer's."""
    assert [piece.finish_reason is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert not any("guidance" in (piece.model_extra or {}) for piece in pieces[:-1])
    streamed, expected = _report(pieces[-1]), _report(whole)
    assert pieces[-1].finish_reason == whole.finish_reason
    assert streamed["tokens"] == expected["tokens"]
    assert streamed["kl"] == pytest.approx(expected["kl"], abs=1e-3)
    assert streamed["rewards"] == pytest.approx(expected["rewards"], abs=1e-4)


def _report(choice: Any) -> dict[str, Any]:
    report: dict[str, Any] = choice.guidance
    assert report.keys() == REPORT
    assert report["method"] == "pargs"
    assert report["tokens"] >= report["guided_tokens"] >= 0
    assert report["tokens"] >= report["interventions"] >= 0
    assert report["rewards"].keys() == {"first"}
    assert report["reward_model_tokens"] > 0
    assert report["policy_tokens"] == 0
    return report
