"""Every method by policies obeys the laws of decoding and is the reference's distribution."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from steersman.guidance.generate import load_runtime
from steersman.guidance.rows import Row
from steersman.guidance.runtime import GuidanceRuntime
from tests import laws
from tests.support.oracle import language_model, plan_of, reference_over
from tests.support.random_input import any_guidance, random_prompts
from tests.support.tiny import VOCABULARY

METHODS: dict[str, dict[str, Any]] = {
    "mixed": {"method": "mixed", "policy": "expert", "mix": 0.6},
    "beyond the policy": {"method": "mixed", "policy": "other", "mix": 1.7},
    "length_control": {"method": "length_control", "policy": "expert", "length": 3},
    "kl_threshold": {"method": "kl_threshold", "policy": "expert", "threshold": 0.01},
    "kl_threshold by samples": {
        "method": "kl_threshold", "policy": "other", "threshold": 0.01, "estimator": "monte_carlo", "samples": 200,
    },
    "kl_threshold with a mixture below": {"method": "kl_threshold", "policy": "expert", "threshold": 99.0, "mix": 0.5},
    "product": {"method": "product", "policies": {"base": 1.0, "expert": 0.7, "other": -0.4}},
    "product without the base": {"method": "product", "policies": {"expert": 1.2, "other": -0.4}},
    "pargs over a mixed policy": {
        "method": "pargs", "reward_model": "first", "policies": {"base": 0.4, "expert": 0.6}, "beta": 1.2,
    },
    "every token's reward": {"method": "pargs", "reward_model": "every", "beta": 1.3, "top_k": None},
    "every token's reward over a mixed policy": {
        "method": "pargs", "top_k": None, "beta": 0.8, "policies": {"base": 0.4, "expert": 0.6},
        "rewards": [{"model": "every", "transform": "log_sigmoid", "reference": 0.2}],
    },
    "every token's reward with a budget": {
        "method": "pargs", "reward_model": "every", "beta": 2.0, "top_k": None, "kl_budget": 0.3,
    },
    "a head": {"method": "pargs", "reward_model": "atop", "beta": 1.3, "top_k": 6},
    "every token's reward by a head": {"method": "pargs", "reward_model": "atop", "beta": 1.3, "top_k": None},
    "a head over a policy head": {
        "method": "pargs", "reward_model": "atop", "policies": {"base": 0.4, "tilted": 0.6}, "beta": 0.9,
    },
    "a policy head": {"method": "mixed", "policy": "tilted", "mix": 0.6},
    "kl_threshold by a head": {"method": "kl_threshold", "policy": "tilted", "threshold": 0.01, "mix": 0.4},
    "gated pargs": {"method": "pargs", "reward_model": "first", "gate": {"first_tokens": 4, "entropy_above": 0.5}},
    "pargs with a budget": {"method": "pargs", "reward_model": "first", "kl_budget": 12.0},
    "mixed with a budget": {"method": "mixed", "policy": "expert", "mix": 1.0, "kl_budget": 0.2},
}  # fmt: skip


@pytest.fixture(scope="module")
def runtime(models: Path) -> GuidanceRuntime:
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    rewards = {name: str(models / name) for name in ("first", "second", "every", "atop")}
    policies = {name: str(models / name) for name in ("expert", "other", "ill", "tilted")}
    return load_runtime(tokenizer, rewards, policies, cache_bytes=2**22)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(runtime: GuidanceRuntime) -> Iterator[None]:
    yield
    for model in (*runtime.reward_models.values(), *runtime.policies.values()):
        assert model.describe().get("cache_blocks_in_use", 0) == 0


@pytest.mark.parametrize("guidance", METHODS.values(), ids=list(METHODS))
@pytest.mark.parametrize("law", [laws.assert_masked_tokens_stay_masked, laws.assert_unguided_rows_keep_their_bits])
def test_every_method_obeys_the_law(
    runtime: GuidanceRuntime, rng: random.Random, law: Callable[..., None], guidance: dict[str, Any]
) -> None:
    law(runtime, 2 * torch.randn(6, VOCABULARY), random_prompts(rng, 6), guidance)


def test_a_mix_of_zero_gives_the_bases_logits_bit_for_bit_and_asks_nobody(
    runtime: GuidanceRuntime, rng: random.Random
) -> None:
    logits, prompts = torch.randn(5, VOCABULARY), random_prompts(rng, 5)
    for guidance in (
        {"method": "mixed", "policy": "expert", "mix": 0.0},
        {"method": "product", "policies": {"base": 1.0, "expert": 0.0}},
    ):
        assert torch.equal(laws.step(runtime, logits, prompts, [guidance] * 5), logits)
        assert plan_of(guidance).policies == ()


def test_batched_equals_single_whatever_the_neighbours_ask_for(runtime: GuidanceRuntime, rng: random.Random) -> None:
    for _ in range(5):
        prompts = random_prompts(rng, 8)
        guidances = [rng.choice([None, any_guidance(rng), *METHODS.values()]) for _ in prompts]
        laws.assert_batched_equals_single(runtime, 2 * torch.randn(8, VOCABULARY), prompts, guidances)


def test_the_distribution_is_the_references(runtime: GuidanceRuntime, models: Path, rng: random.Random) -> None:
    reference = reference_over(models)
    for guidance in METHODS.values():
        logits, prompts = 2 * torch.randn(4, VOCABULARY), random_prompts(rng, 4, longest=40)
        laws.assert_equals_reference(runtime, logits, prompts, [guidance] * 4, reference)
        logits[:, 5:] = torch.where(torch.rand(4, VOCABULARY - 5) < 0.9, -torch.inf, logits[:, 5:])
        laws.assert_equals_reference(runtime, logits, prompts, [guidance] * 4, reference)


def test_the_same_seed_makes_the_same_monte_carlo_decisions_whoever_is_beside(
    runtime: GuidanceRuntime, models: Path, rng: random.Random
) -> None:
    prompt, logits = random_prompts(rng, 1)[0], 2 * torch.randn(40, VOCABULARY)
    policy = language_model(models / "expert")(prompt).double().log_softmax(-1)
    divergences = (policy.exp() * (policy - logits.double().log_softmax(-1))).sum(-1)
    near = {
        "method": "kl_threshold", "policy": "expert", "threshold": float(divergences.median()),
        "estimator": "monte_carlo", "samples": 2,
    }  # fmt: skip

    def decisions(seed: int, crowd: int) -> list[bool]:
        opened = []
        for n in range(40):
            batch = logits[n].expand(crowd + 1, -1).clone()
            requests = [
                runtime.start(("seeded", m), plan_of(near), len(prompt), seed if m == 0 else m)
                for m in range(crowd + 1)
            ]
            # The position decides with the seed: pretend to be at the n-th.
            rows = [Row(m, r, prompt[: len(prompt)], []) for m, r in enumerate(requests)]
            requests[0].seed = seed + 1000 * n
            runtime.step(batch, rows)
            opened.append(not torch.equal(batch[0], logits[n]))
            for request in requests:
                runtime.finish(request.key, [])
        return opened

    first = decisions(7, crowd=0)
    assert decisions(7, crowd=3) == first
    assert decisions(8, crowd=0) != first
    assert 0 < sum(first) < 40, "the threshold lies among the estimates"


def test_a_policy_whose_logits_are_not_numbers_fails_its_own_request(
    runtime: GuidanceRuntime, rng: random.Random
) -> None:
    prompts = [[*p, 319] if n % 2 else p for n, p in enumerate(random_prompts(rng, 4))]
    plan = plan_of({"method": "mixed", "policy": "ill", "mix": 0.5})
    rows = [Row(n, runtime.start(n, plan, len(p)), p, []) for n, p in enumerate(prompts)]
    logits = torch.randn(4, VOCABULARY)
    runtime.step(logits, rows)
    for row in rows:
        assert (row.request.error is not None) == (row.index % 2 == 1)
        if row.request.error is not None:
            assert "policy 'ill'" in row.request.error
            assert int(logits[row.index].argmax()) == 1, "a failed row is made to end"
        runtime.finish(row.request.key, [])


def test_a_trace_says_what_every_token_was_drawn_from(runtime: GuidanceRuntime, rng: random.Random) -> None:
    prompt = random_prompts(rng, 1)[0]
    for guidance, sources in (
        ({"method": "length_control", "policy": "expert", "length": 2}, ["expert", "expert", "base", "base"]),
        ({"method": "mixed", "policy": "expert", "mix": 0.5}, ["mixture"] * 4),
        ({"method": "pargs", "reward_model": "first", "gate": {"first_tokens": 3}}, ["guided"] * 3 + ["base"]),
    ):
        request = runtime.start("traced", plan_of({**guidance, "trace": True}), len(prompt))
        row, output, expected = Row(0, request, prompt, []), [], []
        for _ in range(4):
            row.output = list(output)
            logits = 2 * torch.randn(1, VOCABULARY)
            guided = logits.clone()
            runtime.step(guided, [row])
            token = int(guided.argmax())
            output.append(token)
            expected.append((guided.double().log_softmax(-1), logits.double().log_softmax(-1)))
        report = runtime.finish("traced", output)
        assert report is not None
        assert report.trace is not None
        assert [step["source"] for step in report.trace] == sources
        assert [step["token_id"] for step in report.trace] == output
        for step, (logprobs, base) in zip(report.trace, expected, strict=True):
            token = step["token_id"]
            if step["source"] == "base":
                assert (step["candidates"], step["kl"]) == ([], 0.0)
                continue
            assert step["kl"] == pytest.approx(float(logprobs[0, token] - base[0, token]), abs=1e-4)
            assert step["candidates"][0]["token_id"] == token, "greedy: the best candidate first"
            for candidate in step["candidates"]:
                assert candidate["score"] == pytest.approx(float(logprobs[0, candidate["token_id"]]), abs=1e-4)
                assert candidate["logprob"] == pytest.approx(float(base[0, candidate["token_id"]]), abs=1e-4)
                assert (candidate["reward"] is None) == (guidance["method"] != "pargs")
        assert sum(step["kl"] for step in report.trace) == pytest.approx(report.kl, abs=1e-6)
