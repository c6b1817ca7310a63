"""Guided logits of a reward-guided row in one launch: head, transforms, weights, and the row written in place.

Every program scores its row's candidates, which is little work and is in the cache after the first has done it, clears
its own part of the row, and places the candidates that belong there: no second pass and no order between programs.
"""

import torch
import triton
import triton.language as tl

from steersman.kernels.arguments import RewardTerms
from steersman.kernels.launch import Launch, is_small, require_contiguous, require_rows

_PART = 8192
_STEP = 64


def reward_rerank(
    logits: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    terms: RewardTerms,
    rewards: torch.Tensor,
    hidden: torch.Tensor | None = None,
    heads: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Writes log π up to a constant into rows of `logits` [N, V], in place: log π₀ + Σ_m strength_m T_m(r_m) at the
    candidates, -inf elsewhere.

    rows: [B] int32, the row of `logits` of each; below 0 nothing is written. ids: [B, k] int32 and logprobs: [B, k]
    float32, -inf for a candidate that is masked. hidden: [B, k, D] last hidden states with heads [M, D] of the same
    dtype and bias [M] float32: the rewards are computed and written to `rewards` [B, M, k] float32. Without `hidden`
    they are read from there. A row with a reward that is not finite is left as it was, and its scores show NaN.

    Returns scores [B, k] float32. Other rows keep their bits. Formula: PARGS, Algorithm 1.
    """
    scores = torch.empty_like(logprobs)
    if len(rows):
        plan_launch(logits, rows, ids, logprobs, terms, rewards, scores, hidden, heads, bias).run()
    return scores


def plan_launch(
    logits: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    terms: RewardTerms,
    rewards: torch.Tensor,
    scores: torch.Tensor,
    hidden: torch.Tensor | None,
    heads: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> Launch:
    """The launch."""
    require_rows(logits=logits)
    require_contiguous(
        rows=rows, ids=ids, logprobs=logprobs, rewards=rewards, hidden=hidden, heads=heads, bias=bias,
        strength=terms.strength, scale=terms.scale, shift=terms.shift, log_sigmoid=terms.log_sigmoid,
    )  # fmt: skip
    batch, k = ids.shape
    width = 1 if hidden is None else hidden.shape[-1]
    return Launch(
        _rerank,
        (batch, triton.cdiv(logits.shape[1], _PART)),
        dict(
            logits=logits, stride=logits.stride(0), vocabulary=logits.shape[1], rows=rows, ids=ids,
            logprobs=logprobs, rewards=rewards, scores=scores, strength=terms.strength, scale=terms.scale,
            shift=terms.shift, log_sigmoid=terms.log_sigmoid, hidden=hidden, heads=heads, bias=bias, k=k, width=width,
        ),
        dict(
            TERMS=rewards.shape[1], K=max(16, triton.next_power_of_2(k)), PART=_PART,
            STEP=min(_STEP // (2 if is_small() else 1), triton.next_power_of_2(width)),
        ),
        warps=4,
    )  # fmt: skip


@triton.jit
def _log_sigmoid(values):
    return tl.minimum(values, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(values)))


@triton.jit(do_not_specialize=["k"])
def _rerank(
    logits, stride, vocabulary, rows, ids, logprobs, rewards, scores, strength, scale, shift, log_sigmoid,
    hidden, heads, bias, k, width,
    TERMS: tl.constexpr, K: tl.constexpr, PART: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    line, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    candidates = tl.arange(0, K)
    there = candidates < k
    chosen = tl.load(ids + line * k + candidates, mask=there, other=-1)
    score = tl.load(logprobs + line * k + candidates, mask=there, other=-float("inf"))
    healthy = tl.full([], 1, tl.int32)
    for term in tl.static_range(TERMS):
        place = rewards + (line * TERMS + term) * k + candidates
        if hidden is None:
            reward = tl.load(place, mask=there, other=0.0)
        else:
            sums = tl.zeros([K, STEP], tl.float32)
            for start in range(0, width, STEP):
                columns = start + tl.arange(0, STEP)
                inside = columns < width
                states = tl.load(
                    hidden + (line * k + candidates[:, None]) * width + columns[None, :],
                    mask=there[:, None] & inside[None, :], other=0.0,
                )  # fmt: skip
                weights = tl.load(heads + term * width + columns, mask=inside, other=0.0)
                sums += states.to(tl.float32) * weights.to(tl.float32)[None, :]
            reward = tl.sum(sums, axis=1) + tl.load(bias + term)
            if part == 0:
                tl.store(place, reward, mask=there)
        value = tl.load(scale + line * TERMS + term) * reward + tl.load(shift + line * TERMS + term)
        value = tl.where(tl.load(log_sigmoid + line * TERMS + term) == 1, _log_sigmoid(value), value)
        weight = tl.load(strength + line * TERMS + term)
        # A term that a row does not have may hold anything.
        value = tl.where(weight == 0.0, 0.0, weight * value)
        broken = there & (score != -float("inf")) & ((value != value) | (tl.abs(value) == float("inf")))
        healthy = healthy & (1 - tl.max(broken.to(tl.int32), axis=0))
        score = tl.where(score == -float("inf"), score, score + value)
    shown = tl.where(healthy == 1, score, float("nan"))
    if part == 0:
        tl.store(scores + line * k + candidates, shown, mask=there)
    row = tl.load(rows + line).to(tl.int64)
    if (row >= 0) & (healthy == 1):
        entries = part * PART + tl.arange(0, PART)
        nothing = tl.full([PART], -float("inf"), logits.dtype.element_ty)
        tl.store(logits + row * stride + entries, nothing, mask=entries < vocabulary)
        tl.debug_barrier()
        mine = there & (chosen // PART == part)
        tl.store(logits + row * stride + chosen, score.to(logits.dtype.element_ty), mask=mine)
