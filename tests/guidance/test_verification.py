"""What the check at load lets pass and what it refuses, in full and in half precision."""

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from steersman.guidance import attention, verification
from steersman.guidance.attention import AttentionBatch
from steersman.guidance.cached import CachedModel
from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.layout import Branches, Layout
from steersman.guidance.policies import Policy
from steersman.guidance.rewards import CausalReward
from steersman.guidance.verification import verify
from tests.guidance.test_architectures import ARCHITECTURES
from tests.support.tiny import COMMON, randomise

DTYPES = (torch.float32, torch.bfloat16)
KINDS = ("reward", "policy")
DEEP = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8,
    "num_key_value_heads": 2, "sliding_window": 8, "vocab_size": 2048,
}  # fmt: skip
Patch = tuple[Any, str, Any]


def _build(name: str, kind: str, dtype: torch.dtype, seed: int, spread: float, **changes: Any) -> CachedModel:
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **changes, "num_labels": 1})
    family = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    model = randomise(family.from_config(config).float(), seed, spread).to(dtype)
    return CausalReward(model, name, 2**23) if kind == "reward" else Policy(model, name, 2**23)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_that_are_served_rightly_pass(name: str, kind: str, dtype: torch.dtype) -> None:
    for spread in (0.02, 0.12, 0.3):
        seed = random.randrange(2**31)
        print(f"seed {seed}, weights of {spread}")
        model = _build(name, kind, dtype, seed, spread, **ARCHITECTURES[name])
        for _ in range(3):
            model.check()


def _with_windows(change: Callable[[int], int | None]) -> Patch:
    honest = AttentionBatch.mask

    def mask(batch: AttentionBatch, window: int | None, groups: int, dtype: torch.dtype) -> torch.Tensor:
        return honest(batch, None if window is None else change(window), groups, dtype)

    return AttentionBatch, "mask", mask


def _with_branches(change: Callable[[Branches, int], Branches]) -> Patch:
    honest = Layout.branches

    def branches(layout: Layout, k: int, each: int, scratch: int) -> Branches:
        right = honest(layout, k, each, scratch)
        return change(right, k) if k else right

    return Layout, "branches", branches


def _see_a_neighbour(right: Branches, k: int) -> Branches:
    assert right.seen is not None
    seen, candidate = right.seen.clone(), torch.arange(2, k + 1)
    seen[candidate, candidate - 2] = 0.0
    return right._replace(seen=seen)


def _with_steps(change: Callable[[Layout, AttentionBatch], None]) -> Patch:
    honest = Layout.step

    def step(layout: Layout, *arguments: Any) -> AttentionBatch:
        batch = honest(layout, *arguments)
        change(layout, batch)
        return batch

    return Layout, "step", step


def _see_one_less(_: Layout, batch: AttentionBatch) -> None:
    batch.visible = batch.visible - 1


def _write_elsewhere(layout: Layout, batch: AttentionBatch) -> None:
    block = batch.destinations[0].clone()
    block[:, 0] = layout._cache.padding
    batch.destinations = block, batch.destinations[1]


def _without_caps() -> Patch:
    honest = attention.attend_paged

    def attend(batch: Any, layer: int, *tensors: Any) -> torch.Tensor:
        return honest(batch, layer, *tensors[:-1], replace(tensors[-1], softcap=None))

    return attention, "attend_paged", attend


FAULTS: dict[str, Callable[[], Patch]] = {
    "a window that is one too long": lambda: _with_windows(lambda window: window + 1),
    "a window that is one too short": lambda: _with_windows(lambda window: window - 1),
    "a window that is ignored": lambda: _with_windows(lambda _: None),
    "a mask that hides the last token": lambda: _with_steps(_see_one_less),
    "a last token whose key is not written": lambda: _with_steps(_write_elsewhere),
}
BRANCH_FAULTS: dict[str, Callable[[], Patch]] = {
    "candidates one position ahead": lambda: _with_branches(
        lambda right, _: right._replace(ahead=torch.cat((right.ahead[:1], right.ahead[1:] + 1)))
    ),
    "candidates that see their neighbour": lambda: _with_branches(_see_a_neighbour),
}


@cache
def _deep(name: str, kind: str, dtype: torch.dtype) -> CachedModel:
    return _build(name, kind, dtype, 0, 0.04, **DEEP)


@pytest.fixture(scope="module", autouse=True)
def _forget_models() -> Iterator[None]:
    yield
    _deep.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "fault"),
    [*((kind, fault) for kind in KINDS for fault in FAULTS), *(("reward", fault) for fault in BRANCH_FAULTS)],
)
def test_a_deep_model_with_a_fault_is_refused(
    kind: str, fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _deep("Mistral", kind, dtype)
    model.check()
    monkeypatch.setattr(*{**FAULTS, **BRANCH_FAULTS}[fault]())
    with pytest.raises(ModelRefused, match="differ from plain forwards"):
        model.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_model_whose_scores_are_not_capped_is_refused(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _build("Gemma2", kind, dtype, 0, 0.12, **DEEP, head_dim=64, attn_logit_softcapping=2.0)
    model.check()
    monkeypatch.setattr(*_without_caps())
    with pytest.raises(ModelRefused, match="differ from plain forwards"):
        model.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e6])
def test_the_scale_of_rewards_makes_no_difference(
    scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = _build("Mistral", "reward", dtype, 3, 0.12, sliding_window=8)
    model.model.model.score.weight.mul_(scale)
    model.check()
    if scale:
        monkeypatch.setattr(*_with_windows(lambda window: window + 1))
        with pytest.raises(ModelRefused, match="differ from plain forwards"):
            model.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rewards_that_hardly_differ_pass_and_are_not_divided_by(dtype: torch.dtype) -> None:
    model: Any = _build("Llama", "reward", dtype, 4, 0.12)
    head = model.model.model.score
    head.weight.mul_(1e-5)
    head.bias = torch.nn.Parameter(torch.full((1,), 3.0, dtype=dtype), requires_grad=False)
    model.check()
    head.weight.zero_()
    model.check()


def test_one_unit_of_precision_passes_where_no_rounding_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards of almost one value are rounded to a few numbers, which the repeated forwards may all hit again."""
    monkeypatch.setattr(verification, "_disturbed", lambda *_: nullcontext())
    model: Any = _build("Llama", "reward", torch.bfloat16, 7, 0.12)
    head = model.model.model.score
    head.weight.mul_(0.03)
    head.bias = torch.nn.Parameter(torch.full((1,), 3.0, dtype=torch.bfloat16), requires_grad=False)
    for _ in range(10):
        model.check()


@pytest.mark.parametrize("padding", [0, None])
def test_padding_among_the_candidates_does_not_matter(padding: int | None) -> None:
    """A classifier reads its output at the last token that is not padding, and takes one text at a time without it."""
    for seed in range(5):
        _build("Llama", "reward", torch.float32, seed, 0.3, vocab_size=7, pad_token_id=padding).check()


def test_outputs_that_are_not_numbers_are_refused() -> None:
    model: Any = _build("Llama", "reward", torch.float32, 5, 0.12)
    model.model.model.score.weight.fill_(torch.nan)
    with pytest.raises(ModelRefused, match="by nan"):
        model.check()


@torch.inference_mode()
def test_no_check_finds_in_the_cache_what_an_earlier_one_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that a captured graph does not write would be there from the check before the capture."""
    causal = _build("Llama", "reward", torch.float32, 6, 0.12).model
    counts: list[list[int]] = []
    catch_up = causal.catch_up

    def recorded(prefixes: Any) -> list[int]:
        counts.append(catch_up(prefixes))
        return counts[-1]

    monkeypatch.setattr(causal, "catch_up", recorded)
    for _ in range(3):
        verify(causal, COMMON["vocab_size"], branching=True)
    assert counts == [[16, 11, 4]] * 3
