"""The runtime over Triton's kernels, which a GPU uses, in Triton's interpreter: the references' distributions."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from steersman.guidance import attention, auxiliary, runtime
from steersman.guidance.generate import load_runtime
from steersman.guidance.reference import ReferenceModels, reference_step
from steersman.guidance.request import parse_guidance
from steersman.guidance.rows import Row
from steersman.guidance.runtime import GuidanceRuntime
from steersman.kernels import dispatch
from tests import laws
from tests.support.oracle import causal_rewards, language_model, load_oracle, plan_of
from tests.support.tiny import VOCABULARY
from tests.support.traffic import random_prompts

METHODS: dict[str, dict[str, Any]] = {
    "one reward": {"method": "pargs", "reward_model": "first", "beta": 1.4, "top_k": 6},
    "end token": {"method": "args", "reward_model": "first", "beta": 0.8, "top_k": 4, "end_token": True},
    "two rewards": {
        "method": "pargs", "beta": 0.7, "top_k": 5,
        "rewards": [{"model": "first", "weight": 0.5}, {"model": "second", "transform": "log_sigmoid", "reference": 1}],
    },
    "over a mixture": {
        "method": "pargs", "reward_model": "first", "policies": {"base": 0.4, "expert": 0.6}, "top_k": 3,
    },
    "with a budget": {"method": "pargs", "reward_model": "first", "top_k": 8, "kl_budget": 12.0},
    "mixed": {"method": "mixed", "policy": "expert", "mix": 0.6},
}  # fmt: skip


@pytest.fixture(scope="module")
def calls() -> list[str]:
    """Which kernels ran."""
    return []


@pytest.fixture(scope="module")
def on_kernels(models: Path, calls: list[str]) -> Iterator[GuidanceRuntime]:
    """A runtime that takes the CPU for a device with kernels, from its models' probe on."""
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    with pytest.MonkeyPatch.context() as patch:
        for module in (dispatch, auxiliary, runtime):
            patch.setattr(module, "has_kernels", lambda _: True)
        for module, name in ((attention, "attend_candidates"), (runtime, "write_reranked")):
            patch.setattr(module, name, _counted(getattr(dispatch, name), name, calls))
        rewards = {name: str(models / name) for name in ("first", "second")}
        yield load_runtime(tokenizer, rewards, {"expert": str(models / "expert")}, cache_bytes=2**22)


def _counted(function: Any, name: str, calls: list[str]) -> Any:
    def counted(*arguments: Any) -> Any:
        calls.append(name)
        return function(*arguments)

    return counted


@pytest.mark.parametrize("guidance", METHODS.values(), ids=list(METHODS))
def test_the_distribution_is_the_references(
    on_kernels: GuidanceRuntime, models: Path, rng: random.Random, calls: list[str], guidance: dict[str, Any]
) -> None:
    rewards = {name: causal_rewards(models / name) for name in ("first", "second")}
    policies = {"expert": language_model(models / "expert")}

    def reference(logits: torch.Tensor, prompt: list[int], guidance: dict[str, Any]) -> torch.Tensor:
        sources = ReferenceModels(lambda _: logits, 1, rewards, policies)
        return reference_step(prompt, parse_guidance(guidance), sources).logprobs  # type: ignore[arg-type]

    calls.clear()
    logits, prompts = 2 * torch.randn(3, VOCABULARY), random_prompts(rng, 3, longest=40)
    logits[1, 5:] = torch.where(torch.rand(VOCABULARY - 5) < 0.9, -torch.inf, logits[1, 5:])
    laws.assert_equals_reference(on_kernels, logits, prompts, [guidance] * 3, reference)
    assert "attend_candidates" in calls
    assert ("write_reranked" in calls) == ("rewards" in guidance or "reward_model" in guidance) - (
        "kl_budget" in guidance
    )


def test_rows_that_ask_for_other_things_do_not_touch_one_another(
    on_kernels: GuidanceRuntime, rng: random.Random
) -> None:
    prompts = random_prompts(rng, 5, longest=40)
    guidances = [METHODS["one reward"], None, METHODS["two rewards"], METHODS["mixed"], METHODS["end token"]]
    laws.assert_batched_equals_single(on_kernels, 2 * torch.randn(5, VOCABULARY), prompts, guidances)


def test_an_answer_is_the_references_token_by_token(
    on_kernels: GuidanceRuntime, models: Path, rng: random.Random
) -> None:
    """The cache that one step writes is what the next one reads."""
    oracle, guidance = load_oracle(models, ("first",), ()), METHODS["one reward"]
    prompt = random_prompts(rng, 1, shortest=14, longest=30)[0]
    row = Row(0, on_kernels.start("answer", plan_of(guidance), len(prompt)), prompt, [])
    answer: list[int] = []
    while len(answer) < 12 and 1 not in answer:
        row.output = list(answer)
        logits = oracle.logits([*prompt, *answer]).unsqueeze(0).clone()
        on_kernels.step(logits, [row])
        answer.append(int(logits.argmax()))
    report = on_kernels.finish("answer", answer)
    assert report is not None
    assert oracle.assert_greedy(prompt, guidance, answer, 12) <= 1
    assert oracle.assert_report(prompt, guidance, answer, _as_json(report))


def _as_json(report: Any) -> dict[str, Any]:
    return {name: getattr(report, name) for name in type(report).__slots__}
