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

from steersman.kernels.arguments import HeadRows, Mixed, MixRows, Reranked, RewardTerms

_SELECT = "void(float32[:, ::1], int64[::1], int64[::1], int64[:, ::1], float32[:, ::1], float32[:, ::1])"
_RERANK = (
    "int64(float32[:, ::1], int64[::1], int64[:, ::1], float32[:, ::1], float32[:, ::1], float32[:, ::1], "
    "float32[:, ::1], int32[:, ::1], float32[:, :, ::1], float32[:, ::1])"
)
_NOTHING = np.empty(0, dtype=np.float32)
_NO_LIMITS = np.empty(0, dtype=np.int64)
_GATHER = "void(float32[:, ::1], float32[:, ::1], float32[::1], int64[:, ::1], float32[:, :])"
_BLEND = (
    "void(float32[:, ::1], int64[::1], float32[:, ::1], float32[:, ::1], boolean, float32[:, ::1], float32[:, ::1], "
    "float32[::1], float32[::1], boolean[::1], boolean[::1])"
)
_AFFINE = "void(float32[:, ::1], float32[:, ::1], float32[:, ::1])"
_CHOOSE = (
    "void(float32[:, ::1], float32[:, ::1], float32[::1], float32[::1], boolean[::1], boolean[::1], int64[::1], "
    "float32[:, ::1])"
)
_FEATURES = (
    "boolean(float32[:, ::1], int64[::1], float32[:, ::1], float32[::1], float32[:, ::1], float32[::1], "
    "float32[:, ::1])"
)
_SCORE = (
    "void(float32[:, ::1], int64[::1], float32[:, ::1], float32[::1], float32[:, ::1], float32[::1], "
    "float32[:, ::1], float32[::1], int64[:, ::1], int64, float32[:, :, ::1])"
)


def select_candidates(
    logits: torch.Tensor, rows: torch.Tensor, k: int, limits: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.select_candidates` for `rows` [G] int64 of contiguous logits; tied candidates are ordered by
    id."""
    ids = torch.empty((len(rows), k), dtype=torch.int64)
    values, logprobs = torch.empty((2, len(rows), k), dtype=torch.float32)
    own = _NO_LIMITS if limits is None else limits.squeeze(1).numpy()
    _select(logits.numpy(), rows.numpy(), own, ids.numpy(), values.numpy(), logprobs.numpy())
    return ids, values, logprobs


def reward_rerank(
    logits: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    base: torch.Tensor,
    terms: RewardTerms,
    rewards: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of `kernels.rerank.reward_rerank`, and the rows that are NaN, [G] bool; rows and ids int64, everything
    contiguous."""
    scores = torch.empty_like(base)
    _rerank(*(logits.numpy(), rows.numpy(), ids.numpy(), base.numpy(), *terms.arrays), rewards.numpy(), scores.numpy())
    return scores, scores[:, 0].isnan()


def gather_outputs(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tokens: torch.Tensor
) -> torch.Tensor:
    """As `kernels.gather.gather_outputs`; tokens int64, the others float32, everything contiguous."""
    outputs = torch.empty(tokens.shape, dtype=torch.float32)
    own = _NOTHING if bias is None else bias.numpy()
    _gather(features.numpy(), weight.numpy(), own, tokens.numpy(), outputs.numpy())
    return outputs


def rerank_by_heads(logits: torch.Tensor, hidden: torch.Tensor, asked: HeadRows, done: Reranked, step: int) -> bool:
    """Chooses candidates, scores them by heads and writes their scores into contiguous logits [B, V] float32, and into
    `done` as its `step`: select_candidates, each head's outputs as a term, and reward_rerank. hidden: [B, D] float32,
    contiguous. Returns whether every row was written."""
    written, states, (rows, limits) = logits.numpy(), hidden.numpy(), asked.arrays
    ids, values, rewards = done.ids[step], done.values[step], done.rewards[step]
    _select(written, rows, limits, ids, values, done.logprobs[step])
    for term, head in enumerate(asked.heads):
        _score_by_head(states, rows, *head.arrays, ids, term, rewards)
    return not _rerank(written, rows, ids, values, *asked.terms.arrays, rewards, done.scores[step])


def blend(
    logits: torch.Tensor, rows: torch.Tensor, outputs: torch.Tensor, coefficients: torch.Tensor, *, is_change: bool
) -> Mixed:
    """Writes c₀ log π₀ + c₁ log π up to a constant into `rows` [G] int64 of contiguous logits [B, V] float32.

    outputs: [G, V] float32, logits of π, or with `is_change` what is added to the base's logits to make them.
    coefficients: [G, 2] float32. A token that the base masks, or a policy with a coefficient, stays impossible. A row
    that has no finite sum keeps its bits.
    """
    mixed = Mixed.empty(*outputs.shape)
    _blend(logits.numpy(), rows.numpy(), outputs.numpy(), coefficients.numpy(), is_change, *mixed.arrays)
    return mixed


def blend_by_head(logits: torch.Tensor, hidden: torch.Tensor, asked: MixRows, mixed: Mixed) -> bool:
    """Mixes a head's policy, log π = log π₀ + outputs, into contiguous logits [B, V] float32, as `blend`, and writes
    what became of them into `mixed`. hidden: [B, D] float32, contiguous. Returns whether all features are finite
    numbers; where they are not, nothing is written."""
    (rows, coefficients), head = asked.arrays, asked.head
    features = np.empty((len(rows), len(head.outer_bias)), dtype=np.float32)
    if not _find_features(hidden.numpy(), rows, *head.arrays[:4], features):
        return False
    outputs = torch.addmm(head.bias, torch.from_numpy(features), head.tokens.t())
    _blend(logits.numpy(), rows, outputs.numpy(), coefficients, True, *mixed.arrays)
    return True


def choose_mixed(mixed: Mixed, tokens: torch.Tensor, values: np.ndarray) -> None:
    """Writes into values [G, 4] float32 what mixed rows give to their tokens [G] int64: log π and log π₀, and whether
    the most likely token was changed, and the row written (1 or 0)."""
    _choose(*mixed.arrays, tokens.numpy(), values)


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


@_compile("float32(float32)", inline="always", fastmath={"contract"})
def _exp(value: Any) -> Any:
    """e^value, taken between e^-87 and e^87, within 2 units in the last place, in operations that LLVM does eight at a
    time: 2^n e^r with |r| at most log(2) / 2, e^r by Cephes' polynomial."""
    value = min(max(value, np.float32(-87.0)), np.float32(87.0))
    power = np.floor(value * np.float32(1.44269504) + np.float32(0.5))
    rest = value - power * np.float32(0.693359375) + power * np.float32(2.12194440e-4)
    series = np.float32(1.9875691500e-4)
    series = series * rest + np.float32(1.3981999507e-3)
    series = series * rest + np.float32(8.3334519073e-3)
    series = series * rest + np.float32(4.1665795894e-2)
    series = series * rest + np.float32(1.6666665459e-1)
    series = series * rest + np.float32(5.0000001201e-1)
    series = series * rest * rest + rest + np.float32(1.0)
    return series * np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)


@_compile("float32(float32[::1], float32)", fastmath={"reassoc", "contract"})
def _sum_block(values: Any, largest: Any) -> Any:
    total = np.float32(0.0)
    # By place: LLVM takes eight terms at a time of no other loop.
    for place in range(len(values)):
        total += _exp(values[place] - largest)
    return total


# Sums of blocks in float32, their total in float64.
@_compile("float64(float32[::1], float32)")
def _sum_exp(values: Any, largest: Any) -> Any:
    total: Any = 0.0
    for start in range(0, len(values), 4096):
        total += _sum_block(values[start : start + 4096], largest)
    return total


@_compile(_SELECT)
def _select(logits, rows, limits, ids, values, logprobs):
    lines, k = ids.shape
    for line in range(lines):
        row, best, names = logits[rows[line]], values[line], ids[line]
        for token in range(len(row)):
            value = row[token]
            if token < k or value > best[k - 1]:
                place = min(token, k - 1)
                while place > 0 and best[place - 1] < value:
                    best[place], names[place] = best[place - 1], names[place - 1]
                    place -= 1
                best[place], names[place] = value, token
        total = best[0] + math.log(_sum_exp(row, best[0]))
        limit = limits[line] if len(limits) else k
        for place in range(k):
            if math.isnan(total):
                # A row of -inf alone keeps its values; NaN anywhere spoils the row.
                best[place] = best[place] if best[0] == -np.inf else np.nan
            logprobs[line, place] = best[place] - total
            if place >= limit:
                best[place] = logprobs[line, place] = -np.inf


@_compile(_RERANK)
def _rerank(logits, rows, ids, base, strength, scale, shift, log_sigmoid, rewards, scores):
    """Returns how many rows are NaN."""
    lines, k = ids.shape
    broken = 0
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
            broken += 1
            scores[line] = np.nan
            continue
        moved = np.float32(_log_sum_exp(base[line]) - _log_sum_exp(scores[line]))
        scores[line] += moved
        row = rows[line]
        if row >= 0:
            logits[row] = -np.inf
            for candidate in range(k):
                logits[row, ids[line, candidate]] = scores[line, candidate]
    return broken


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


@_compile(_AFFINE, fastmath={"reassoc", "contract"})
def _add_product(inputs, weight, outputs):
    """outputs [n, W] += inputs [n, D] · weight [D, W], which is read once: four of its rows for all inputs, and from
    the cache for two of these at a time."""
    whole = len(weight) - len(weight) % 4
    for start in range(0, whole, 4):
        first, second, third, fourth = weight[start], weight[start + 1], weight[start + 2], weight[start + 3]
        for line in range(0, len(inputs) - 1, 2):
            own, sums = inputs[line, start : start + 4], outputs[line]
            next_own, next_sums = inputs[line + 1, start : start + 4], outputs[line + 1]
            a, b, c, d = own[0], own[1], own[2], own[3]
            e, f, g, h = next_own[0], next_own[1], next_own[2], next_own[3]
            for channel in range(len(sums)):
                w, x, y, z = first[channel], second[channel], third[channel], fourth[channel]
                sums[channel] += (a * w + b * x) + (c * y + d * z)
                next_sums[channel] += (e * w + f * x) + (g * y + h * z)
        if len(inputs) % 2:
            own, sums = inputs[-1, start : start + 4], outputs[-1]
            a, b, c, d = own[0], own[1], own[2], own[3]
            for channel in range(len(sums)):
                sums[channel] += (a * first[channel] + b * second[channel]) + (c * third[channel] + d * fourth[channel])
    for start in range(whole, len(weight)):
        for line in range(len(inputs)):
            value, sums = inputs[line, start], outputs[line]
            for channel in range(len(sums)):
                sums[channel] += value * weight[start, channel]


# Assignments of slices are copied one by one.
@_compile("void(float32[::1], float32[::1])")
def _copy(values, destination):
    for place in range(len(values)):
        destination[place] = values[place]


# Python's division, which raises where it divides by 0, is compiled one value at a time.
@_compile("void(float32[::1])", fastmath={"contract"}, error_model="numpy")
def _apply_silu(values):
    for place in range(len(values)):
        values[place] /= np.float32(1.0) + _exp(-values[place])


@_compile(_FEATURES, fastmath={"contract"})
def _find_features(hidden, rows, inner, inner_bias, outer, outer_bias, features):
    """f(h) of the rows; returns whether all of it are finite numbers."""
    states = np.empty((len(rows), hidden.shape[1]), dtype=np.float32)
    middle = np.empty((len(rows), len(inner_bias)), dtype=np.float32)
    for line in range(len(rows)):
        _copy(hidden[rows[line]], states[line])
        _copy(inner_bias, middle[line])
        _copy(outer_bias, features[line])
    _add_product(states, inner, middle)
    for line in range(len(rows)):
        _apply_silu(middle[line])
    _add_product(middle, outer, features)
    finite = True
    for line in range(len(rows)):
        for value in features[line]:
            finite &= math.isfinite(value)
    return finite


@_compile(_SCORE)
def _score_by_head(hidden, rows, inner, inner_bias, outer, outer_bias, tokens, bias, ids, term, rewards):
    features = np.empty((len(rows), len(outer_bias)), dtype=np.float32)
    _find_features(hidden, rows, inner, inner_bias, outer, outer_bias, features)
    _gather(features, tokens, bias, ids, rewards[:, term])


# Four maxima, so that none waits for the one before.
@_compile("float32(float32[::1])", fastmath={"nnan", "nsz"})
def _largest(values):
    """Of values without NaN."""
    first = second = third = fourth = values[0]
    whole = len(values) - len(values) % 4
    for start in range(0, whole, 4):
        first, second = max(first, values[start]), max(second, values[start + 1])
        third, fourth = max(third, values[start + 2]), max(fourth, values[start + 3])
    for start in range(whole, len(values)):
        first = max(first, values[start])
    return max(max(first, second), max(third, fourth))


@_compile("float32(float32[::1], float32)")
def _total(values, largest):
    if not math.isfinite(largest):
        return largest
    return np.float32(largest + math.log(_sum_exp(values, largest)))


@_compile("int64(float32[::1], float32, float32[::1], float32)")
def _count_common(values, value, others, other):
    """Places at which two rows hold one value each."""
    count = 0
    for place in range(len(values)):
        count += (values[place] == value) & (others[place] == other)
    return count


@_compile("void(float32[::1], float32[::1], float32, float32, float32[::1], float32[::1])", fastmath={"contract"})
def _mix(row, policy, first, second, base, mixed):
    """mixed = first · row + second · policy, and base = row."""
    impossible = np.float32(-np.inf)
    for token in range(len(row)):
        value, other = row[token], policy[token]
        base[token] = value
        absent = other == impossible
        blended = first * value + (np.float32(0.0) if absent else second * other)
        masked = value == impossible or (absent and second != np.float32(0.0))
        mixed[token] = impossible if masked else blended


@_compile(_BLEND)
def _blend(logits, rows, outputs, coefficients, is_change, base, guided, base_total, guided_total, changed, kept):
    for line in range(len(rows)):
        row, own, mixed = logits[rows[line]], base[line], guided[line]
        second = coefficients[line, 1]
        first = coefficients[line, 0] + second if is_change else coefficients[line, 0]
        _mix(row, outputs[line], first, second, own, mixed)
        peak, best = _largest(own), _largest(mixed)
        base_total[line], guided_total[line] = _total(own, peak), _total(mixed, best)
        kept[line] = math.isfinite(guided_total[line])
        if kept[line]:
            changed[line] = _count_common(own, peak, mixed, best) == 0
            _copy(mixed, row)
        else:
            changed[line], guided_total[line] = False, base_total[line]
            _copy(own, mixed)


@_compile(_CHOOSE)
def _choose(base, guided, base_total, guided_total, changed, kept, tokens, values):
    for line in range(len(tokens)):
        token = tokens[line]
        values[line, 0] = guided[line, token] - guided_total[line]
        values[line, 1] = base[line, token] - base_total[line]
        values[line, 2], values[line, 3] = changed[line], kept[line]
