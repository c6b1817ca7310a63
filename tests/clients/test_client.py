"""The typed clients against a real server: what the SDK returns, with guidance."""

import asyncio
import random

import openai
import pytest
from pydantic import BaseModel, ValidationError

from steersman.clients.client import (
    AsyncSteersman,
    GuidanceReport,
    Reward,
    RewardGuidance,
    Steersman,
    TracedToken,
    guidance_of,
    pargs,
)
from tests.support.server import Server

GUIDANCE = pargs("first", Reward(model="second", weight=-0.5), beta=1.5, top_k=5)
HELLO = [{"role": "user", "content": "hello"}]


class Mood(BaseModel):
    """An answer of few words."""

    happy: bool


@pytest.fixture(scope="module")
def client(server: Server) -> Steersman:
    return Steersman(base_url=f"{server.url}/v1", max_retries=0, timeout=300)


@pytest.fixture
def seed() -> int:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    return seed


def test_completions_return_the_sdks_objects_with_a_report(client: Steersman) -> None:
    answer = client.completions.create(model="base", prompt="a lamp", max_tokens=6, n=2, guidance=GUIDANCE)
    assert isinstance(answer, openai.types.Completion)
    for choice in answer.choices:
        _check(guidance_of(choice))


def test_chat_completions_return_the_sdks_objects_with_a_report(client: Steersman) -> None:
    answer = client.chat.completions.create(model="base", messages=HELLO, max_tokens=6, guidance=GUIDANCE)
    assert isinstance(answer, openai.types.chat.ChatCompletion)
    _check(guidance_of(answer.choices[0]))


def test_a_plain_answer_has_no_report(client: Steersman) -> None:
    answer = client.completions.create(model="base", prompt="a lamp", max_tokens=3)
    assert guidance_of(answer.choices[0]) is None


def test_reports_are_frozen(client: Steersman) -> None:
    answer = client.completions.create(model="base", prompt="a", max_tokens=1, guidance=GUIDANCE)
    report = guidance_of(answer.choices[0])
    with pytest.raises(ValidationError):
        report.kl = 0.0  # type: ignore[misc,union-attr]


def test_a_trace_is_typed(client: Steersman, seed: int) -> None:
    answer = client.completions.create(
        model="base", prompt="a lamp", max_tokens=6, seed=seed, guidance=pargs("first", top_k=4, trace=True)
    )
    report = guidance_of(answer.choices[0])
    assert report is not None
    assert report.trace is not None
    assert len(report.trace) == report.tokens
    for step in report.trace:
        assert isinstance(step, TracedToken)
        assert step.source == "guided"
        assert len(step.candidates) == 4
        chosen = next(c for c in step.candidates if c.token_id == step.token_id)
        assert chosen.token == step.token
        assert chosen.score - chosen.logprob == pytest.approx(step.kl, abs=1e-4)


def test_streams_end_with_a_report(client: Steersman, seed: int) -> None:
    whole = client.completions.create(model="base", prompt="a lamp", max_tokens=9, seed=seed, guidance=GUIDANCE)
    chunks = list(
        client.completions.create(
            model="base", prompt="a lamp", max_tokens=9, seed=seed, stream=True, guidance=GUIDANCE
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [guidance_of(chunk.choices[0]) is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    ours, theirs = guidance_of(chunks[-1].choices[0]), guidance_of(whole.choices[0])
    assert ours is not None
    assert theirs is not None
    assert (ours.tokens, ours.interventions) == (theirs.tokens, theirs.interventions)
    assert ours.kl == pytest.approx(theirs.kl, abs=1e-4)


def test_the_asynchronous_client_does_the_same(server: Server, client: Steersman, seed: int) -> None:
    fields = {"model": "base", "messages": HELLO, "max_tokens": 8, "seed": seed, "guidance": GUIDANCE}
    whole = client.chat.completions.create(**fields)

    async def ask() -> tuple[str | None, str, list[GuidanceReport | None]]:
        async with AsyncSteersman(base_url=f"{server.url}/v1", max_retries=0, timeout=300) as asynchronous:
            answer = await asynchronous.chat.completions.create(**fields)
            stream = await asynchronous.chat.completions.create(**fields, stream=True)
            chunks = [chunk.choices[0] async for chunk in stream]
            text = "".join(choice.delta.content or "" for choice in chunks)
            await _other_calls(asynchronous)
            return answer.choices[0].message.content, text, [guidance_of(choice) for choice in chunks]

    answered, streamed, reports = asyncio.run(ask())
    assert answered == streamed == whole.choices[0].message.content
    _check(reports[-1])
    assert not any(reports[:-1])


def test_dictionaries_options_and_raw_responses_work_as_in_the_sdk(client: Steersman) -> None:
    raw = client.with_options(timeout=120).completions.with_raw_response.create(
        model="base",
        prompt="a",
        max_tokens=40,
        guidance={"method": "args", "reward_model": "first"},
        extra_body={"min_tokens": 30},
        extra_headers={"X-Request-Id": "mine"},
    )
    report = guidance_of(raw.parse().choices[0])
    assert report is not None
    assert report.method == "args"
    assert report.tokens >= 30, "extra_body was lost"


def test_parse_returns_objects_of_the_response_format(client: Steersman) -> None:
    answer = client.chat.completions.parse(
        model="base", messages=HELLO, response_format=Mood, max_tokens=150, temperature=1, seed=1, guidance=GUIDANCE
    )
    assert isinstance(answer.choices[0].message.parsed, Mood)
    assert guidance_of(answer.choices[0]) is not None


def test_the_servers_refusal_is_the_sdks_error(client: Steersman) -> None:
    with pytest.raises(openai.BadRequestError, match="no reward model 'absent' is loaded") as caught:
        client.completions.create(model="base", prompt="a", guidance=pargs("absent"))
    assert caught.value.param == "guidance.reward_model"


def test_guidance_lists_what_the_server_offers(client: Steersman) -> None:
    offered = client.guidance()
    models = {model.name: model for model in offered.reward_models}
    assert set(models) == {"first", "second", "narrow", "broken", "text", "every", "atop"}
    assert (models["narrow"].window, models["narrow"].kind, models["text"].kind) == (64, "causal", "text")
    assert offered.methods["pargs"]["properties"].keys() == RewardGuidance.model_fields.keys()
    assert {"expert", "other"} <= {policy.name for policy in offered.policies}
    assert offered.presets["blended"] == {"method": "mixed", "policy": "expert", "mix": 0.7}
    assert offered.limits["top_k"] >= 10


async def _other_calls(client: AsyncSteersman) -> None:
    assert {model.name for model in (await client.guidance()).reward_models} >= {"first", "second"}
    stream = await client.completions.create(model="base", prompt="a", max_tokens=3, stream=True, guidance=GUIDANCE)
    _check([guidance_of(chunk.choices[0]) async for chunk in stream][-1])
    answer = await client.completions.create(model="base", prompt="a", max_tokens=3, guidance=GUIDANCE)
    _check(guidance_of(answer.choices[0]))


def _check(report: GuidanceReport | None) -> None:
    assert report is not None
    assert report.method == "pargs"
    assert report.tokens == report.guided_tokens > 0
    assert 0 <= report.interventions <= report.tokens
    assert report.rewards.keys() == {"first", "second"}
    assert report.reward_model_tokens > 2 * 6 * (report.tokens - 1)
    assert report.policy_tokens == 0
