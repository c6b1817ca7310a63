"""The sampling step's small operations on a CPU, each in one call: as many torch operations cost more than their work.

Compiled by Numba, which vLLM brings along, when this module is imported: in seconds, and later from its cache. Without
Numba `kernels.reference` computes the same.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit

from steersman.kernels.arguments import RewardTerms

_RERANK = (
    "void(float32[:, ::1], int64[::1], int64[:, ::1], float32[:, ::1], float32[:, ::1], float32[:, ::1], "
    "float32[:, ::1], int32[:, ::1], float32[:, :, ::1], float32[:, ::1])"
)
_NOTHING = np.empty(0, dtype=np.float32)
_GATHER = "void(float32[:, ::1], float32[:, ::1], float32[::1], int64[:, ::1], float32[:, ::1])"


def reward_rerank(
    logits: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    base: torch.Tensor,
    terms: RewardTerms,
    rewards: torch.Tensor,
) -> torch.Tensor:
    """As `kernels.rerank.reward_rerank`; rows and ids int64, everything contiguous."""
    scores = torch.empty_like(base)
    _rerank(
        *(tensor.numpy() for tensor in (logits, rows, ids, base)),
        *(tensor.numpy() for tensor in (terms.strength, terms.scale, terms.shift, terms.log_sigmoid)),
        *(rewards.numpy(), scores.numpy()),
    )
    return scores


def gather_outputs(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tokens: torch.Tensor
) -> torch.Tensor:
    """As `kernels.gather.gather_outputs`; tokens int64, the others float32, everything contiguous."""
    outputs = torch.empty(tokens.shape, dtype=torch.float32)
    own = _NOTHING if bias is None else bias.numpy()
    _gather(features.numpy(), weight.numpy(), own, tokens.numpy(), outputs.numpy())
    return outputs


def _compile(signature: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As numba.njit, with a cache on disk where there is a folder for it."""

    def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(signature, cache=True, **options)(function)
        except RuntimeError:
            return njit(signature, **options)(function)

    return compile_function


@_compile("float64(float32[::1])")
def _log_sum_exp(values):
    largest = values.max()
    total = 0.0
    for value in values:
        total += math.exp(value - largest)
    return largest + math.log(total)


@_compile(_RERANK)
def _rerank(logits, rows, ids, base, strength, scale, shift, log_sigmoid, rewards, scores):
    lines, k = ids.shape
    for line in range(lines):
        healthy, present = True, False
        for candidate in range(k):
            score = base[line, candidate]
            if score != -np.inf:
                present = True
                for term in range(strength.shape[1]):
                    weight = strength[line, term]
                    # A term that a row does not have may hold anything.
                    if weight != 0:
                        value = scale[line, term] * rewards[line, term, candidate] + shift[line, term]
                        if log_sigmoid[line, term] == 1:
                            value = np.float32(min(value, 0.0) - math.log1p(math.exp(-abs(value))))
                        score += weight * value
                healthy &= math.isfinite(score)
            scores[line, candidate] = score
        if not (healthy and present):
            scores[line] = np.nan
            continue
        moved = np.float32(_log_sum_exp(base[line]) - _log_sum_exp(scores[line]))
        scores[line] += moved
        row = rows[line]
        if row >= 0:
            logits[row] = -np.inf
            for candidate in range(k):
                logits[row, ids[line, candidate]] = scores[line, candidate]


# Sums may be taken in any order, so that they are taken eight at a time.
@_compile(_GATHER, fastmath={"reassoc", "contract"})
def _gather(features, weight, bias, tokens, outputs):
    for line in range(tokens.shape[0]):
        for place in range(tokens.shape[1]):
            token = tokens[line, place]
            total = np.float32(0.0)
            for channel in range(features.shape[1]):
                total += features[line, channel] * weight[token, channel]
            outputs[line, place] = total + bias[token] if len(bias) else total
