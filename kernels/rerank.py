"""Guided logits of a reward-guided row in one launch: transforms, weights, and the row written in place.

Every program scores all of its row's candidates, which is little work and stays in the cache after the first has done
it, fills its own part of the row with -inf, and writes the candidates that lie there: no second pass over the row and
no order between programs.
"""

import torch
import triton
import triton.language as tl

from steersman.kernels.arguments import RewardTerms
from steersman.kernels.launch import Launch, require_contiguous, require_rows

_PART = 8192


def reward_rerank(
    logits: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    base: torch.Tensor,
    terms: RewardTerms,
    rewards: torch.Tensor,
) -> torch.Tensor:
    """Writes log π up to a constant into rows of `logits` [N, V], in place: log π₀ + Σ_m strength_m T_m(r_m) at the
    candidates, -inf elsewhere (PARGS, Algorithm 1). The constant keeps the log-sum-exp of each row's candidates, so
    that nothing downstream depends on where a reward has its zero.

    rows: [B] integers, the row of `logits` of each; below 0 nothing is written. ids: [B, k] integers and base: [B, k]
    float32, log π₀ up to a constant, -inf for a candidate that is masked. rewards: [B, M, k] float32. A row with a
    score that is not finite, and not that of a masked candidate, or without any candidate, is left as it was, and its
    scores are NaN.

    Returns scores [B, k] float32. Other rows keep their bits.
    """
    scores = torch.empty_like(base)
    if len(rows):
        plan_launch(logits, rows, ids, base, terms, rewards, scores).run()
    return scores


def plan_launch(
    logits: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    base: torch.Tensor,
    terms: RewardTerms,
    rewards: torch.Tensor,
    scores: torch.Tensor,
) -> Launch:
    """The launch of `reward_rerank`; raises ValueError for a tensor whose strides the kernel cannot read."""
    require_rows(logits=logits)
    require_contiguous(
        rows=rows, ids=ids, base=base, rewards=rewards, scores=scores,
        strength=terms.strength, scale=terms.scale, shift=terms.shift, log_sigmoid=terms.log_sigmoid,
    )  # fmt: skip
    batch, k = ids.shape
    return Launch(
        _rerank,
        (batch, triton.cdiv(logits.shape[1], _PART)),
        dict(
            logits=logits, stride=logits.stride(0), vocabulary=logits.shape[1], rows=rows, ids=ids,
            base=base, rewards=rewards, scores=scores, strength=terms.strength, scale=terms.scale,
            shift=terms.shift, log_sigmoid=terms.log_sigmoid, k=k, terms=rewards.shape[1],
        ),
        dict(K=max(16, triton.next_power_of_2(k)), PART=_PART),
        warps=4,
    )  # fmt: skip


@triton.jit
def _log_sigmoid(values):
    return tl.minimum(values, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(values)))


@triton.jit
def _log_sum_exp(values):
    largest = tl.max(values, axis=0)
    return largest + tl.log(tl.sum(tl.exp(values - largest), axis=0))


@triton.jit
def add_term(score, reward, place, strength, scale, shift, log_sigmoid):
    """Scores and the rewards of the term at `place` of RewardTerms, transformed and weighted."""
    value = tl.load(scale + place) * reward + tl.load(shift + place)
    value = tl.where(tl.load(log_sigmoid + place) == 1, _log_sigmoid(value), value)
    weight = tl.load(strength + place)
    # A term that a row does not have may hold anything.
    return score + tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def settle(base, score):
    """Scores with the log-sum-exp of `base` and its masks, and 1 for a row that may be written: which has a candidate,
    and no score that is not finite."""
    masked = base == -float("inf")
    score = tl.where(masked, base, score)
    finite = masked | (tl.abs(score) < float("inf"))
    healthy = tl.min(finite.to(tl.int32), axis=0) * tl.max((~masked).to(tl.int32), axis=0)
    move = _log_sum_exp(tl.where(healthy == 1, base, 0.0)) - _log_sum_exp(tl.where(healthy == 1, score, 0.0))
    return tl.where(masked, score, score + move), healthy


@triton.jit(do_not_specialize=["k", "terms"])
def _rerank(
    logits, stride, vocabulary, rows, ids, base, rewards, scores, strength, scale, shift, log_sigmoid, k, terms,
    K: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    line, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    candidates = tl.arange(0, K)
    there = candidates < k
    chosen = tl.load(ids + line * k + candidates, mask=there, other=-1)
    before = tl.load(base + line * k + candidates, mask=there, other=-float("inf"))
    score = before
    for term in range(terms):
        reward = tl.load(rewards + (line * terms + term) * k + candidates, mask=there, other=0.0)
        score = add_term(score, reward, line * terms + term, strength, scale, shift, log_sigmoid)
    score, healthy = settle(before, score)
    if part == 0:
        tl.store(scores + line * k + candidates, tl.where(healthy == 1, score, float("nan")), mask=there)
    row = tl.load(rows + line).to(tl.int64)
    if (row >= 0) & (healthy == 1):
        entries = part * PART + tl.arange(0, PART)
        nothing = tl.full([PART], -float("inf"), logits.dtype.element_ty)
        tl.store(logits + row * stride + entries, nothing, mask=entries < vocabulary)
        tl.debug_barrier()
        mine = there & (chosen // PART == part)
        tl.store(logits + row * stride + chosen, score.to(logits.dtype.element_ty), mask=mine)
