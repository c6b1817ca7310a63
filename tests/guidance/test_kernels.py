"""The runtime over Triton's kernels, which a GPU uses, in Triton's interpreter: the references' distributions."""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from steersman.guidance.rows import Row
from steersman.guidance.runtime import GuidanceRuntime
from steersman.kernels.launch import Launch
from steersman.server import compilation
from tests import laws
from tests.support.gpu_runtime import DEVICE, acting_as_gpu, count_launches, load_gpu_runtime
from tests.support.oracle import (
    load_oracle,
    plan_of,
    reference_over,
)
from tests.support.random_input import random_prompts
from tests.support.tiny import VOCABULARY

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
    "a vocabulary head": {"method": "pargs", "reward_model": "every", "beta": 1.1, "top_k": 7},
    "a head": {"method": "pargs", "reward_model": "atop", "beta": 1.1, "top_k": 7},
    "a head, every token": {"method": "pargs", "reward_model": "atop", "beta": 1.1, "top_k": None},
    "a head policy": {"method": "mixed", "policy": "tilted", "mix": 0.8},
    "a threshold on a head": {"method": "kl_threshold", "policy": "tilted", "threshold": 0.5, "mix": 0.3},
    "a head over a head": {
        "method": "pargs", "reward_model": "atop", "policies": {"base": 0.4, "tilted": 0.6}, "top_k": 5,
    },
    "two kinds of reward": {
        "method": "pargs", "beta": 0.9, "top_k": 6,
        "rewards": [{"model": "every", "weight": 0.7}, {"model": "first", "weight": 0.4}, {"model": "atop"}],
    },
    "mixed": {"method": "mixed", "policy": "expert", "mix": 0.6},
    "length control": {"method": "length_control", "policy": "expert", "length": 3},
    "a threshold": {"method": "kl_threshold", "policy": "expert", "threshold": 0.9, "mix": 0.3},
    "a product": {"method": "product", "policies": {"base": 0.7, "expert": 0.9, "other": -0.4}},
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> set[tuple[Any, ...]]:
    """Variants that were compiled when models were loaded."""
    return set()


@pytest.fixture(scope="module")
def on_kernels(models: Path, compiled: set[tuple[Any, ...]]) -> Iterator[GuidanceRuntime]:
    """A runtime that takes the CPU for a device with kernels, from its models' probe on. Steps of up to ten candidates
    are replayed."""
    with acting_as_gpu():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Launch, "compile", lambda launch: compiled.add(launch.variant))
            patch.setattr(compilation, "has_kernels", lambda _: True)
            runtime = load_gpu_runtime(models)
            compilation.compile_sampling_kernels(VOCABULARY, DEVICE)
        yield runtime


@pytest.fixture
def launched() -> Iterator[Counter[str]]:
    """Launches by kernel."""
    with count_launches() as counter:
        yield counter


@pytest.mark.parametrize("guidance", METHODS.values(), ids=list(METHODS))
def test_the_distribution_is_the_references(
    on_kernels: GuidanceRuntime, models: Path, rng: random.Random, launched: Counter[str], guidance: dict[str, Any]
) -> None:
    reference = reference_over(models)
    logits, prompts = 2 * torch.randn(3, VOCABULARY), random_prompts(rng, 3, longest=40)
    logits[1, 5:] = torch.where(torch.rand(VOCABULARY - 5) < 0.9, -torch.inf, logits[1, 5:])
    laws.assert_equals_reference(on_kernels, logits, prompts, [guidance] * 3, reference)
    by_rewards, budgeted = "rewards" in guidance or "reward_model" in guidance, "kl_budget" in guidance
    # What a graph replays on a GPU is not seen from here.
    atop = {"atop", "tilted"} & set(plan_of(guidance).models)
    assert (launched["_attend"] > 0) == (atop != set(plan_of(guidance).models)) or DEVICE.type == "cuda"
    reranked = by_rewards and not budgeted and guidance["top_k"] is not None
    heads_alone = atop == set(plan_of(guidance).models) and "policies" not in guidance
    assert (launched["_rerank"] > 0, launched["_head_rerank"] > 0) == (
        reranked and not heads_alone,
        reranked and heads_alone,
    )
    blended = guidance["method"] in ("mixed", "length_control", "kl_threshold")
    by_head = guidance.get("policy") == "tilted"
    assert (launched["_blend"] > 0, launched["_settle"] > 0) == (blended and not by_head, blended and by_head)


def test_rows_that_ask_for_other_things_do_not_touch_one_another(
    on_kernels: GuidanceRuntime, rng: random.Random
) -> None:
    prompts = random_prompts(rng, 5, longest=40)
    guidances = [METHODS["one reward"], None, METHODS["two rewards"], METHODS["mixed"], METHODS["end token"]]
    laws.assert_batched_equals_single(on_kernels, 2 * torch.randn(5, VOCABULARY), prompts, guidances)


def test_what_steps_launch_has_been_compiled_before(
    on_kernels: GuidanceRuntime, compiled: set[tuple[Any, ...]], rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling within a step would hold every stream up for seconds."""
    found: set[tuple[Any, ...]] = set()
    run = Launch.run

    def note(launch: Launch) -> None:
        found.add(launch.variant)
        run(launch)

    monkeypatch.setattr(Launch, "run", note)
    monte_carlo = {"estimator": "monte_carlo", "samples": 64}
    estimated = [{**METHODS[name], **monte_carlo} for name in ("a threshold", "a threshold on a head")]
    methods = [*METHODS.values(), *estimated]
    prompts = random_prompts(rng, len(methods), longest=60)
    laws.step(on_kernels, 2 * torch.randn(len(methods), VOCABULARY), prompts, methods)
    laws.step(on_kernels, 2 * torch.randn(1, VOCABULARY), prompts[:1], methods[:1])
    mixed = METHODS["a head policy"]
    laws.step(on_kernels, 2 * torch.randn(17, VOCABULARY), random_prompts(rng, 17, longest=9), [mixed] * 17)
    for k in (1, 20, 64):
        head = {**METHODS["a head"], "top_k": k}
        laws.step(on_kernels, 2 * torch.randn(2, VOCABULARY), prompts[:2], [head, METHODS["a head"]])
    assert {variant[0] for variant in found} == {
        "_scan", "_finish", "_rerank", "_gather", "_stream", "_sample", "_blend", "_project", "_settle", "_attend",
        "_merge", "_scan_best", "_head_rerank",
    }  # fmt: skip
    assert not found - compiled


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
        logits = oracle.logits([*prompt, *answer]).unsqueeze(0).to(DEVICE, copy=True)
        on_kernels.step(logits, [row])
        answer.append(int(logits.argmax()))
    report = on_kernels.finish("answer", answer)
    assert report is not None
    assert oracle.assert_greedy(prompt, guidance, answer, 12) <= 1
    assert oracle.assert_report(prompt, guidance, answer, _as_json(report))


def _as_json(report: Any) -> dict[str, Any]:
    return {name: getattr(report, name) for name in type(report).__slots__}
