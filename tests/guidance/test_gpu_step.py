"""What a step on a GPU promises: the host never waits, failures are learned late and hurt nobody, and what runs beside
the base's forward is joined before it is used. On a GPU where there is one, else acted out on the CPU."""

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from steersman.guidance.overlap import CudaSideStream
from steersman.guidance.reference import ReferenceModels, reference_step
from steersman.guidance.request import parse_guidance
from steersman.guidance.rows import Row
from steersman.guidance.runtime import GuidanceRuntime
from tests.support.device import LateSide, SlowCopy, copy_when_joined, forbid_host_reads
from tests.support.gpu_runtime import DEVICE, acting_as_gpu, load_gpu_runtime
from tests.support.oracle import causal_rewards, language_model, plan_of, vocabulary_rewards
from tests.support.random_input import random_prompts
from tests.support.tiny import VOCABULARY

UNWAITED: dict[str, dict[str, Any]] = {
    "rewards": {"method": "pargs", "reward_model": "first", "beta": 1.4, "top_k": 6},
    "a vocabulary head": {"method": "pargs", "reward_model": "every", "beta": 1.1, "top_k": 7},
    "every token's reward": {"method": "pargs", "reward_model": "every", "beta": 1.1, "top_k": None},
    "two rewards": {"method": "pargs", "rewards": [{"model": "first"}, {"model": "every"}], "top_k": 5},
    "rewards over a mixture": {
        "method": "pargs", "reward_model": "first", "policies": {"base": 0.4, "expert": 0.6}, "top_k": 3,
    },
    "on the first tokens": {"method": "pargs", "reward_model": "first", "gate": {"first_tokens": 9}},
    "mixed": {"method": "mixed", "policy": "expert", "mix": 0.6},
    "a threshold": {"method": "kl_threshold", "policy": "expert", "threshold": 0.9, "mix": 0.3},
    "an estimated threshold": {
        "method": "kl_threshold", "policy": "expert", "threshold": 0.9, "estimator": "monte_carlo", "samples": 64,
    },
    "a product": {"method": "product", "policies": {"base": 0.7, "expert": 0.9, "other": -0.4}},
}  # fmt: skip
BEYOND = {
    "rewards": (UNWAITED["rewards"], "reward model 'first'"),
    "a vocabulary head": (UNWAITED["a vocabulary head"], "reward model 'every'"),
    "rewards over a mixture": (UNWAITED["rewards over a mixture"], "policy 'expert'"),
    "mixed": ({**UNWAITED["mixed"], "mix": 0.9}, "policy 'expert'"),
    "a threshold": ({**UNWAITED["a threshold"], "threshold": 0.0}, "policy 'expert'"),
}
AHEAD = {name: UNWAITED[name] for name in ("a vocabulary head", "mixed", "a threshold", "a product")}
STEPS = 3
PADDED = VOCABULARY + 8
"""Logits of a base whose vocabulary is padded beyond the models' embeddings."""


@pytest.fixture(scope="module")
def models_on_gpu(models: Path) -> Iterator[GuidanceRuntime]:
    with acting_as_gpu():
        yield load_gpu_runtime(models)


class CountedStream(CudaSideStream):
    """The GPU's own second stream."""

    forks = 0

    @property
    def waiting(self) -> bool:
        """Whether something was forked and not joined."""
        return self._forked

    def fork(self) -> AbstractContextManager[None]:
        """See SideStream.fork."""
        self.forks += 1
        return super().fork()


Side = LateSide | CountedStream


@pytest.fixture
def side() -> Side:
    return CountedStream(DEVICE) if DEVICE.type == "cuda" else LateSide()


@pytest.fixture
def runtime(models_on_gpu: GuidanceRuntime, side: Side) -> GuidanceRuntime:
    """Whose results arrive late, and whose second stream runs as late as it may."""
    SlowCopy.arrived = False
    copy = copy_when_joined(side)
    return GuidanceRuntime(models_on_gpu.reward_models, 1, models_on_gpu.policies, side, copy)


class Decoding:
    """Answers that grow by tokens which the device alone knows."""

    def __init__(
        self, runtime: GuidanceRuntime, rng: random.Random, guidances: list[dict[str, Any]], width: int = VOCABULARY
    ) -> None:
        """width: of the base's logits."""
        self.runtime = runtime
        self.rng = rng
        self.prompts = random_prompts(rng, len(guidances), shortest=14, longest=40)
        self.outputs: list[list[int]] = [[] for _ in guidances]
        """What the host knows: -1 for every token."""
        self.tokens: list[list[int]] = [[] for _ in guidances]
        self.requests = [
            runtime.start(("decoding", n), plan_of(guidance), len(self.prompts[n]))
            for n, guidance in enumerate(guidances)
        ]
        self.width = width
        self.logits = torch.empty(0)

    def text(self, n: int) -> list[int]:
        return [*self.prompts[n], *self.tokens[n]]

    def rows(self) -> list[Row]:
        return [Row(n, r, self.prompts[n], self.outputs[n]) for n, r in enumerate(self.requests)]

    def last(self) -> torch.Tensor:
        return torch.tensor([self.text(n)[-1] for n in range(len(self.requests))], device=DEVICE)

    def step(self) -> torch.Tensor:
        """Guides fresh logits of the base, kept in `logits`."""
        self.logits = 2 * torch.randn(len(self.requests), self.width, device=DEVICE)
        guided, rows, last = self.logits.clone(), self.rows(), self.last()
        self.runtime.step(guided, rows, last)
        return guided

    def advance(self) -> None:
        """Every answer grows by a token."""
        for n, output in enumerate(self.outputs):
            output.append(-1)
            self.tokens[n].append(self.rng.randrange(2, VOCABULARY - 8))

    def finish(self) -> list[Any]:
        return [self.runtime.finish(r.key, self.tokens[n]) for n, r in enumerate(self.requests)]


@pytest.mark.parametrize("guidance", UNWAITED.values(), ids=list(UNWAITED))
def test_the_host_asks_the_device_for_nothing(
    runtime: GuidanceRuntime, rng: random.Random, guidance: dict[str, Any]
) -> None:
    decoding = Decoding(runtime, rng, [guidance, UNWAITED["mixed"], UNWAITED["rewards"]])
    decoding.step()
    decoding.advance()
    rows, last = decoding.rows(), decoding.last()
    logits = 2 * torch.randn(len(rows), VOCABULARY, device=DEVICE)
    before = logits.clone()
    biased = logits.masked_fill(torch.rand_like(logits) < 0.5, -torch.inf)
    masked = logits.clone()
    with forbid_host_reads():
        # Another batch than the step before's, then the whole one, then one whose clients mask tokens.
        runtime.step(logits, rows[:2], last)
        runtime.step(logits, rows, last)
        runtime.step(masked, rows, last, biased)
    assert not torch.equal(logits, before)
    open_rows = (masked != before).any(dim=-1)
    assert bool((masked[open_rows][biased[open_rows].isneginf()] == -torch.inf).all())
    reports = decoding.finish()
    assert all(report.error is None and report.tokens == 1 for report in reports)


def test_a_read_in_a_step_would_be_noticed(runtime: GuidanceRuntime, rng: random.Random) -> None:
    decoding = Decoding(runtime, rng, [{**UNWAITED["rewards"], "gate": {"entropy_above": 0.1}}])
    decoding.step()
    decoding.advance()
    rows, last = decoding.rows(), decoding.last()
    with pytest.raises(AssertionError, match="the host asks"), forbid_host_reads():
        runtime.step(2 * torch.randn(1, VOCABULARY, device=DEVICE), rows, last)
    decoding.finish()


def test_a_wait_that_torch_itself_finds_is_told_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda _: None)
    with pytest.raises(AssertionError, match="the host asks"), forbid_host_reads():
        raise RuntimeError("called a synchronizing CUDA operation")
    with pytest.raises(RuntimeError, match="something else"), forbid_host_reads():
        raise RuntimeError("something else")


def test_a_failure_is_learned_late_and_until_then_the_base_decodes(
    runtime: GuidanceRuntime, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = Decoding(runtime, rng, [UNWAITED["rewards"], UNWAITED["rewards"]])
    model = runtime.reward_models["first"]
    _spoil(model, monkeypatch, row=0)
    guided = decoding.step()
    assert decoding.requests[0].error is None
    assert torch.equal(guided[0], decoding.logits[0])
    assert not torch.equal(guided[1], decoding.logits[1])
    SlowCopy.arrived = True
    monkeypatch.undo()
    decoding.advance()
    guided = decoding.step()
    assert "not a finite number" in str(decoding.requests[0].error)
    assert guided[0].argmax() == 1
    assert torch.isneginf(guided[0]).sum() == VOCABULARY - 1
    assert decoding.requests[1].error is None
    assert [report.error is None for report in decoding.finish()] == [False, True]


@pytest.mark.parametrize("ahead", [False, True], ids=["in the step", "ahead"])
@pytest.mark.parametrize(("guidance", "model"), BEYOND.values(), ids=list(BEYOND))
def test_a_last_token_that_a_model_cannot_read_is_learned_late_and_hurts_nobody(
    runtime: GuidanceRuntime, rng: random.Random, guidance: dict[str, Any], model: str, ahead: bool
) -> None:
    decoding = Decoding(runtime, rng, [guidance] * 3, PADDED)
    decoding.step()
    decoding.advance()
    decoding.tokens[1][-1] = rng.randrange(VOCABULARY, PADDED)
    rows, last = decoding.rows(), decoding.last()
    logits = 2 * torch.randn(3, PADDED, device=DEVICE)
    guided = logits.clone()
    if ahead:
        runtime.read_ahead(rows, last.clone)
    with forbid_host_reads():
        runtime.step(guided, rows, last)
    assert all(request.error is None for request in decoding.requests)
    assert [torch.equal(guided[n], logits[n]) for n in range(3)] == [False, True, False]
    SlowCopy.arrived = True
    decoding.advance()
    guided = decoding.step()
    assert [request.error is None for request in decoding.requests] == [True, False, True]
    assert f"{model} could not read the answer" in str(decoding.requests[1].error)
    assert f"the token ids 0 to {VOCABULARY - 1}" in str(decoding.requests[1].error)
    assert guided[1].argmax() == 1
    assert [report.error is None for report in decoding.finish()] == [True, False, True]


def test_a_row_without_a_candidate_that_its_model_reads_is_decoded_by_the_base_until_that_is_learned(
    runtime: GuidanceRuntime, rng: random.Random
) -> None:
    decoding = Decoding(runtime, rng, [UNWAITED["rewards"]] * 2, PADDED)
    decoding.step()
    decoding.advance()
    logits = 2 * torch.randn(2, PADDED, device=DEVICE)
    logits[0, VOCABULARY:] += 50
    guided, rows, last = logits.clone(), decoding.rows(), decoding.last()
    with forbid_host_reads():
        runtime.step(guided, rows, last)
    assert [torch.equal(guided[n], logits[n]) for n in range(2)] == [True, False]
    SlowCopy.arrived = True
    decoding.advance()
    decoding.step()
    assert "raise top_k" in str(decoding.requests[0].error)
    assert [report.error is None for report in decoding.finish()] == [False, True]


def _spoil(model: Any, monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    score: Callable[..., Any] = model.score

    def spoiled(*arguments: Any) -> Any:
        rewards, read = score(*arguments)
        rewards[row, 0] = torch.nan
        return rewards, read

    monkeypatch.setattr(model, "score", spoiled)


@pytest.mark.parametrize("guidance", AHEAD.values(), ids=list(AHEAD))
def test_what_is_read_ahead_is_joined_before_it_is_used(
    runtime: GuidanceRuntime, side: Side, models: Path, rng: random.Random, guidance: dict[str, Any]
) -> None:
    _assert_steps_equal_reference(runtime, side, models, rng, guidance)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a real stream may be early by luck")
@pytest.mark.parametrize("guidance", AHEAD.values(), ids=list(AHEAD))
def test_without_the_join_the_distribution_is_wrong(
    models_on_gpu: GuidanceRuntime, side: Side, models: Path, rng: random.Random, guidance: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(side, "join", lambda: None)
    runtime = GuidanceRuntime(models_on_gpu.reward_models, 1, models_on_gpu.policies, side, SlowCopy)
    with pytest.raises(AssertionError, match="differs from the reference"):
        _assert_steps_equal_reference(runtime, side, models, rng, guidance)


def _assert_steps_equal_reference(
    runtime: GuidanceRuntime, side: Side, models: Path, rng: random.Random, guidance: dict[str, Any]
) -> None:
    rewards = {"first": causal_rewards(models / "first"), "every": vocabulary_rewards(models / "every")}
    policies = {name: language_model(models / name) for name in ("expert", "other")}
    decoding = Decoding(runtime, rng, [guidance] * 3)
    decoding.step()
    try:
        for count in range(1, STEPS):
            decoding.advance()
            last = decoding.last()
            runtime.read_ahead(decoding.rows(), last.clone)
            assert side.forks == count
            guided = decoding.step()
            for n, row in enumerate(guided):
                sources = ReferenceModels(lambda _, n=n: decoding.logits[n].cpu(), 1, rewards, policies)  # type: ignore[misc]
                expected = reference_step(decoding.text(n), parse_guidance(guidance), sources, count)  # type: ignore[arg-type]
                error = (row.cpu().double().softmax(-1) - expected.logprobs.exp()).abs().max()
                assert error < 1e-4, f"row {n} differs from the reference by {error}"
    finally:
        decoding.finish()


def test_work_that_fails_on_the_second_stream_is_joined(side: Side) -> None:
    values = torch.zeros(4, device=DEVICE)
    before = torch.cuda.current_stream() if DEVICE.type == "cuda" else None

    def fail_half_way() -> None:
        values.add_(1)
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"), side.fork():
        fail_half_way()
    assert before is None or torch.cuda.current_stream() == before
    assert side.waiting
    side.join()
    assert not side.waiting
    assert values.tolist() == [1] * 4


def test_what_was_read_ahead_is_read_once(
    runtime: GuidanceRuntime, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = Decoding(runtime, rng, [UNWAITED["mixed"], UNWAITED["a vocabulary head"]])
    decoding.step()
    decoding.advance()
    runtime.read_ahead(decoding.rows(), decoding.last)
    for model in (runtime.policies["expert"], runtime.reward_models["every"]):
        monkeypatch.setattr(model, "read", _never)
    decoding.step()
    prompts = [len(prompt) for prompt in decoding.prompts]
    reports = decoding.finish()
    assert [r.policy_tokens for r in reports] == [prompts[0] + 1, 0]
    assert [r.reward_model_tokens for r in reports] == [0, prompts[1] + 1]


def test_a_row_that_went_on_otherwise_is_read_again(
    runtime: GuidanceRuntime, side: Side, models: Path, rng: random.Random
) -> None:
    """A request may be preempted between the two; what it had said by then comes back with it."""
    decoding = Decoding(runtime, rng, [UNWAITED["mixed"]])
    decoding.step()
    decoding.advance()
    runtime.read_ahead(decoding.rows(), decoding.last)
    decoding.outputs[0][:] = decoding.tokens[0]
    decoding.advance()
    guided = decoding.step()
    policies = {"expert": language_model(models / "expert")}
    sources = ReferenceModels(lambda _: decoding.logits[0].cpu(), 1, {}, policies)
    expected = reference_step(decoding.text(0), parse_guidance(UNWAITED["mixed"]), sources, 2)  # type: ignore[arg-type]
    assert (guided[0].cpu().double().softmax(-1) - expected.logprobs.exp()).abs().max() < 1e-4
    decoding.finish()


def _never(*_: Any) -> Any:
    raise AssertionError("the model is asked a second time")
