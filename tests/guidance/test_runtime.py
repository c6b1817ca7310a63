"""The runtime obeys the laws of decoding, in every combination of rows."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from steersman.guidance.generate import load_runtime
from steersman.guidance.reference import ReferenceModels, reference_step
from steersman.guidance.request import parse_guidance
from steersman.guidance.rows import Row
from steersman.guidance.runtime import GuidanceRuntime
from tests import laws
from tests.support.oracle import causal_rewards, plan_of, text_rewards
from tests.support.random_input import random_guidance, random_prompts
from tests.support.tiny import END, VOCABULARY

NAMES = ("first", "second")


@pytest.fixture(scope="module")
def runtime(models: Path) -> GuidanceRuntime:
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    return load_runtime(tokenizer, {n: str(models / n) for n in (*NAMES, "text")}, cache_bytes=2**22)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(runtime: GuidanceRuntime) -> Iterator[None]:
    yield
    for model in runtime.reward_models.values():
        assert model.describe().get("cache_blocks_in_use", 0) == 0


@pytest.mark.parametrize("method", ["pargs", "args"])
@pytest.mark.parametrize(
    "law",
    [
        laws.assert_zero_strength_keeps_the_supports_logits,
        laws.assert_masked_tokens_stay_masked,
        laws.assert_unguided_rows_keep_their_bits,
    ],
)
def test_every_method_obeys_the_law(
    runtime: GuidanceRuntime, rng: random.Random, law: Callable[..., None], method: str
) -> None:
    for top_k, end_token in ((1, False), (10, False), (10, True), (40, True)):
        guidance = {"method": method, "reward_model": "first", "top_k": top_k, "end_token": end_token, "beta": 1.3}
        prompts = random_prompts(rng, 5)
        law(runtime, torch.randn(5, VOCABULARY), prompts, guidance)


def test_batched_equals_single(runtime: GuidanceRuntime, rng: random.Random) -> None:
    for _ in range(5):
        prompts = random_prompts(rng, 7)
        guidances = [random_guidance(rng, NAMES) if rng.random() < 0.8 else None for _ in prompts]
        laws.assert_batched_equals_single(runtime, torch.randn(7, VOCABULARY), prompts, guidances)


def test_the_distribution_is_the_references(runtime: GuidanceRuntime, models: Path, rng: random.Random) -> None:
    rewards = {name: causal_rewards(models / name) for name in NAMES}
    rewards["text"] = text_rewards(models / "text", models)

    def reference(logits: torch.Tensor, prompt: list[int], guidance: dict[str, Any]) -> torch.Tensor:
        return reference_step(
            prompt, parse_guidance(guidance), ReferenceModels(lambda _: logits, END, rewards)
        ).logprobs

    for pair in (NAMES, ("first", "text")):
        for _ in range(8):
            prompts = random_prompts(rng, 4, longest=40)
            guidances = [random_guidance(rng, pair) for _ in prompts]
            if "text" in pair:
                guidances = [{**g, "end_token": False} for g in guidances]
            laws.assert_equals_reference(runtime, torch.randn(4, VOCABULARY), prompts, guidances, reference)


def test_all_rows_of_one_model_are_scored_in_one_forward(runtime: GuidanceRuntime, rng: random.Random) -> None:
    embedding = runtime.reward_models["first"].model.body.get_input_embeddings()  # type: ignore[attr-defined]
    calls = []
    handle = embedding.register_forward_hook(lambda *_: calls.append(1))
    prompts = random_prompts(rng, 24, shortest=2, longest=20)
    guidance = {"method": "pargs", "reward_model": "first"}
    rows = [Row(n, runtime.start(("one", n), plan_of(guidance), len(p)), p, []) for n, p in enumerate(prompts)]
    runtime.step(torch.randn(24, VOCABULARY), rows)
    calls.clear()
    for row in rows:
        row.output = [5]
    runtime.step(torch.randn(24, VOCABULARY), rows)
    handle.remove()
    assert len(calls) == 1
    for row in rows:
        runtime.finish(row.request.key, [5])


def test_scoring_a_position_again_changes_nothing(runtime: GuidanceRuntime, rng: random.Random) -> None:
    prompt = random_prompts(rng, 1, shortest=20)[0]
    plan = plan_of({"method": "pargs", "reward_model": "first"})
    logits = torch.randn(1, VOCABULARY)
    row = Row(0, runtime.start("again", plan, len(prompt)), prompt, [])
    results = []
    for _ in range(3):
        guided = logits.clone()
        runtime.step(guided, [row])
        results.append(guided)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    token = int(results[0].argmax())
    report = runtime.finish("again", [token])
    assert report is not None
    assert report.tokens == report.guided_tokens == 1


def test_a_paused_request_goes_on_where_it_was(runtime: GuidanceRuntime, rng: random.Random) -> None:
    prompt = random_prompts(rng, 1, shortest=40)[0]
    plan = plan_of({"method": "pargs", "reward_model": "second", "beta": 2.0})
    bases = torch.randn(6, 1, VOCABULARY)

    def decode(pause_at: int | None) -> tuple[list[int], Any]:
        row = Row(0, runtime.start("paused", plan, len(prompt)), prompt, [])
        output: list[int] = []
        for n, base in enumerate(bases):
            if n == pause_at:
                runtime.pause("paused", [*prompt, *output])
                row = Row(0, runtime.start("paused", plan, len(prompt)), prompt, list(output))
            row.output = list(output)
            guided = base.clone()
            runtime.step(guided, [row])
            output.append(int(guided.argmax()))
        return output, runtime.finish("paused", output)

    output, report = decode(None)
    again, resumed = decode(3)
    assert again == output
    assert resumed.kl == pytest.approx(report.kl, abs=1e-4)
    assert resumed.guided_tokens == report.guided_tokens == 6


def test_more_requests_than_the_cache_holds_fail_alone(models: Path, rng: random.Random) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    small = load_runtime(tokenizer, {"first": str(models / "first")}, cache_bytes=12 * 16 * 512)
    capacity = small.reward_models["first"].model.cache.num_blocks  # type: ignore[attr-defined]
    prompts = [[rng.randrange(2, 300) for _ in range(33)] for _ in range(capacity)]
    guidance = {"method": "pargs", "reward_model": "first"}
    rows = [Row(n, small.start(n, plan_of(guidance), 33), p, []) for n, p in enumerate(prompts)]
    logits = torch.randn(capacity, VOCABULARY)
    small.step(logits, rows)
    failed = [row for row in rows if row.request.error is not None]
    assert len(failed) == capacity - capacity // 3
    assert all("cache blocks" in str(row.request.error) for row in failed)
    assert all(int(logits[row.index].argmax()) == END for row in failed), "a failed row is made to end"
    for row in rows:
        small.finish(row.request.key, [])
    assert small.reward_models["first"].describe()["cache_blocks_in_use"] == 0


@pytest.mark.parametrize("fitting", [0, 1])
def test_a_text_beyond_its_models_window_fails_alone_by_its_own_fault(
    models: Path, rng: random.Random, fitting: int
) -> None:
    """Also where one of two candidates would fit: the end token has no text."""
    runtime = load_runtime(AutoTokenizer.from_pretrained(models / "base"), {"text": str(models / "text")})
    model: Any = runtime.reward_models["text"]
    prompts = [[rng.randrange(10, 250) for _ in range(length)] for length in (8, 40, 7)]
    model.window = model.measure(prompts[1], None) - 1 + fitting
    logits = torch.full((3, VOCABULARY), -20.0)
    logits[:, [END, 20]] = 5.0
    guidance = {"method": "pargs", "reward_model": "text", "top_k": 2}
    expected = laws.step(runtime, logits[[0, 2]], [prompts[0], prompts[2]], [guidance] * 2)
    rows = [Row(n, runtime.start(n, plan_of(guidance), len(p)), p, []) for n, p in enumerate(prompts)]
    runtime.step(logits, rows)
    torch.testing.assert_close(logits[[0, 2]], expected, rtol=0, atol=1e-4)
    reports = [runtime.finish(n, []) for n in range(3)]
    assert [report and report.fault for report in reports] == [None, "too_long", None]
    assert f"'text' reads at most {model.window} tokens, the text has" in str(reports[1] and reports[1].error)
    assert not any(runtime.work.failures.values()), "the model is not to blame"
