"""A policy that is a head on the base's hidden state, mixed into the base's rows without its logits ever being there.

log π(v) = log π₀(v) + U[v] · f(h) + c[v] up to a constant. One launch streams U once for the whole batch: a program
multiplies its tiles of U with every row's f(h), adds the base's logits, and leaves partial sums of the row's KL and of
the normalisers before and after. The last launch merges them. A blend needs no normaliser, so that rows without a gate
are written by the first launch already, and the last one only takes back those whose KL is not a number. A gate is
decided by the KL, which no program knows before all have finished: there the first launch leaves the policy's logits in
the memory of the guided rows, and the last one reads those and the base's, but not U, and writes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from steersman.kernels.arguments import BlendedRows, BlendRows
from steersman.kernels.blend import (
    GROUP,
    STATISTICS,
    BlendWorkspace,
    merge_partial,
    plan_sample,
    require_samples,
)
from steersman.kernels.blend import make_workspace as make_blend_workspace
from steersman.kernels.launch import Launch, is_small, most_splits, require_contiguous, require_rows, split_rows

_FEW = {"ROWS": 16, "TILE": 128, "DEPTH": 32}
_MANY = {"ROWS": 32, "TILE": 64, "DEPTH": 32}
"""Rows of the batch, entries of the vocabulary and channels of f(h) that are multiplied at once, as many as registers
hold; each size is a variant. For more rows there are more programs, which run side by side and find U in L2."""
_PART = 4096
# A size that covers most vocabularies, so that few variants are compiled.
_SPLITS = 512
_EXTRAS = 7


@dataclass(frozen=True, slots=True)
class HeadBlendWorkspace:
    """What the launches hand to one another, for up to B rows of V logits."""

    blend: BlendWorkspace
    """Partial sums of policy and base, and what samples need, as between the launches of `policy_blend`."""
    extras: torch.Tensor
    """[B, splits, 7] float32: Σ exp of the base's logits whatever the policy masks; of the rows with an open and a
    closed gate the maximum, Σ exp, and the largest logit among the base's most likely tokens."""


def make_workspace(rows: int, vocabulary: int, device: torch.device) -> HeadBlendWorkspace:
    """Memory for `head_blend` on up to `rows` rows; one workspace serves one stream."""
    splits = max(most_splits(triton.cdiv(vocabulary, size["TILE"])) for size in (_FEW, _MANY))
    blend = make_blend_workspace(rows, vocabulary, device)
    partial = torch.empty(rows, splits, STATISTICS, dtype=torch.float32, device=device)
    return HeadBlendWorkspace(
        BlendWorkspace(partial, blend.groups, blend.cumulative),
        torch.empty(rows, splits, _EXTRAS, dtype=torch.float32, device=device),
    )


def head_blend(
    logits: torch.Tensor,
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    asked: BlendRows,
    workspace: HeadBlendWorkspace,
    samples: int = 0,
    gated: bool = True,
) -> BlendedRows:
    """Writes c₀ log base + c₁ log policy, up to a constant, into rows of `logits` [N, V] float32, in place, where
    log policy = log base + weight · features + bias.

    features: [B, R] float32. weight: [W, R] and bias: [W], of any precision; tokens from W on are masked by the policy.
    asked: its rows differ from one another; of a line whose row is below 0 all logits count as masked. samples: as for
    `policy_blend`. gated: False where no threshold is above -inf; rows are written by the first launch then. Masks,
    rows that keep their bits and rows that are not open are those of `policy_blend`.
    """
    rows, vocabulary = len(features), logits.shape[1]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=logits.device)

    blended = BlendedRows(
        kl=empty(rows), estimate=empty(rows), opened=empty(rows, dtype=torch.int32),
        base=empty(rows, vocabulary), guided=empty(rows, vocabulary),
        base_total=empty(rows), guided_total=empty(rows), changed=empty(rows, dtype=torch.bool),
    )  # fmt: skip
    if rows:
        for launch in plan_launches(logits, features, weight, bias, asked, workspace, blended, samples, gated):
            launch.run()
    return blended


def plan_launches(
    logits: torch.Tensor,
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    asked: BlendRows,
    workspace: HeadBlendWorkspace,
    blended: BlendedRows,
    samples: int,
    gated: bool,
) -> list[Launch]:
    """The launches, in order."""
    (rows, rank), vocabulary = features.shape, logits.shape[1]
    require_samples(samples)
    if samples and not gated:
        raise ValueError(f"samples: {samples} decide nothing where no row has a gate; draw none")
    require_rows(logits=logits, weight=weight)
    require_contiguous(
        features=features, bias=bias, rows=asked.rows, threshold=asked.threshold, above=asked.above,
        below=asked.below, seeds=asked.seeds,
    )  # fmt: skip
    size = _FEW if rows <= _FEW["ROWS"] or is_small() else _MANY
    batches, tiles = triton.cdiv(rows, size["ROWS"]), triton.cdiv(vocabulary, size["TILE"])
    split = split_rows(batches, tiles)
    bucket = max(_SPLITS, triton.next_power_of_2(split.splits))
    partial, groups = workspace.blend.partial, workspace.blend.groups
    shared = dict(
        logits_ptr=logits, logits_stride=logits.stride(0), rows_ptr=asked.rows, vocabulary=vocabulary,
        above_ptr=asked.above, below_ptr=asked.below, partial_ptr=partial, partial_stride=partial.stride(0),
        extras_ptr=workspace.extras, extras_stride=workspace.extras.stride(0), base_ptr=blended.base,
        guided_ptr=blended.guided,
    )  # fmt: skip
    project = Launch(
        _project,
        (batches, split.splits),
        dict(
            **shared, features_ptr=features, weight_ptr=weight, weight_stride=weight.stride(0), bias_ptr=bias,
            lines=rows, rank=rank, width=len(bias), tiles=tiles, tiles_each=split.tiles_each, groups_ptr=groups,
            groups_stride=groups.stride(0),
        ),
        dict(**size, GROUP=GROUP, GATED=gated, SAMPLED=samples > 0),
        warps=8,
        stages=4,
    )  # fmt: skip
    settle = Launch(
        _settle,
        (rows, triton.cdiv(vocabulary, _PART) if gated else 1),
        dict(
            **shared, splits=split.splits, threshold_ptr=asked.threshold, kl_ptr=blended.kl,
            estimate_ptr=blended.estimate, opened_ptr=blended.opened, base_total_ptr=blended.base_total,
            guided_total_ptr=blended.guided_total, changed_ptr=blended.changed,
        ),
        dict(PART=_PART, SPLITS=bucket, GATED=gated, SAMPLED=samples > 0),
        warps=8,
    )  # fmt: skip
    if not samples:
        return [project, settle]
    # Until the last launch has written, the guided rows hold the policy's logits and the base's are untouched.
    drawn = plan_sample(logits, blended.guided, asked, workspace.blend, split.splits, bucket, samples, blended.estimate)
    return [project, drawn, settle]


@triton.jit
def _mix(q, p, on_base, on_policy):
    """Coefficients times logits of base and policy; -inf where the base has it, or a policy that counts."""
    masked = (q == -float("inf")) | (tl.where(on_policy != 0.0, p, 0.0) == -float("inf"))
    mixed = on_base * tl.where(q == -float("inf"), 0.0, q) + on_policy * tl.where(p == -float("inf"), 0.0, p)
    return tl.where(masked, -float("inf"), mixed)


@triton.jit
def _find_peak(values):
    """The largest of each row, or the lowest finite float, from which a difference is never NaN."""
    return tl.maximum(tl.max(values, axis=1), -3.4028234e38)


@triton.jit
def _add_sum(top, total, high, added):
    """Σ exp of two parts, each relative to its own maximum, relative to the larger one."""
    larger = tl.maximum(top, high)
    return larger, total * tl.exp(top - larger) + added * tl.exp(high - larger)


@triton.jit
def _keep_at(best, top, own, high):
    """A value at the larger of two maxima; the larger value where they are equal."""
    return tl.where(high > top, own, tl.where(high < top, best, tl.maximum(best, own)))


@triton.jit(do_not_specialize=["lines", "tiles", "tiles_each"])
def _project(
    logits_ptr, logits_stride, rows_ptr, vocabulary, above_ptr, below_ptr, partial_ptr, partial_stride,
    extras_ptr, extras_stride, base_ptr, guided_ptr, features_ptr, weight_ptr, weight_stride, bias_ptr,
    lines, rank, width, tiles, tiles_each, groups_ptr, groups_stride,
    ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr,
    SAMPLED: tl.constexpr,
):  # fmt: skip
    line, split = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.program_id(1)
    there = line < lines
    row = tl.load(rows_ptr + line, mask=there, other=-1).to(tl.int64)
    wanted = row >= 0
    lowest = tl.full([ROWS], -3.4028234e38, tl.float32)
    nothing = tl.zeros([ROWS], tl.float32)
    p_top, p_sum, gap_sum = lowest, nothing, nothing
    q_top, q_sum, base_sum = lowest, nothing, nothing
    above_top, above_sum, above_at = lowest, nothing, lowest
    below_top, below_sum, below_at = lowest, nothing, lowest
    for tile in range(split * tiles_each, tl.minimum((split + 1) * tiles_each, tiles)):
        entry = tile * TILE + tl.arange(0, TILE)
        inside, known = entry < vocabulary, entry < width
        own = logits_ptr + row[:, None] * logits_stride + entry[None, :]
        q = tl.load(own, mask=inside[None, :] & wanted[:, None], other=-float("inf"))
        change = tl.zeros([ROWS, TILE], tl.float32)
        for start in range(0, rank, DEPTH):
            channel = start + tl.arange(0, DEPTH)
            real = channel < rank
            weight = tl.load(
                weight_ptr + entry.to(tl.int64)[None, :] * weight_stride + channel[:, None],
                mask=known[None, :] & real[:, None],
                other=0.0,
            ).to(tl.float32)
            features = tl.load(
                features_ptr + line[:, None] * rank + channel[None, :],
                mask=there[:, None] & real[None, :],
                other=0.0,
            )
            change = tl.dot(features, weight, change, input_precision="tf32x3")
        change += tl.load(bias_ptr + entry, mask=known, other=-float("inf")).to(tl.float32)[None, :]
        absent = (change == -float("inf")) | (q == -float("inf"))
        p = tl.where(absent, -float("inf"), q + change)
        held = line[:, None] * vocabulary + entry[None, :]
        mine = inside[None, :] & there[:, None]
        tl.store(base_ptr + held, q, mask=mine)
        if GATED:
            tl.store(guided_ptr + held, p, mask=mine)

        high = _find_peak(p)
        mass = tl.exp(p - high[:, None])
        _, gap_sum = _add_sum(p_top, gap_sum, high, tl.sum(mass * tl.where(absent, 0.0, change), axis=1))
        p_top, p_sum = _add_sum(p_top, p_sum, high, tl.sum(mass, axis=1))
        high = _find_peak(q)
        mass = tl.exp(q - high[:, None])
        best = q == high[:, None]
        # Loaded for each tile anew: registers are scarcer than the cache's time.
        on_base = tl.load(above_ptr + 2 * line, mask=there, other=1.0)[:, None]
        on_policy = tl.load(above_ptr + 2 * line + 1, mask=there, other=0.0)[:, None]
        opened = _mix(q, p, on_base, on_policy)
        above_at = _keep_at(above_at, q_top, tl.max(tl.where(best, opened, -float("inf")), axis=1), high)
        if GATED:
            on_base = tl.load(below_ptr + 2 * line, mask=there, other=1.0)[:, None]
            on_policy = tl.load(below_ptr + 2 * line + 1, mask=there, other=0.0)[:, None]
            closed = _mix(q, p, on_base, on_policy)
            below_at = _keep_at(below_at, q_top, tl.max(tl.where(best, closed, -float("inf")), axis=1), high)
        _, q_sum = _add_sum(q_top, q_sum, high, tl.sum(tl.where(absent, 0.0, mass), axis=1))
        q_top, base_sum = _add_sum(q_top, base_sum, high, tl.sum(mass, axis=1))
        high = _find_peak(opened)
        above_top, above_sum = _add_sum(above_top, above_sum, high, tl.sum(tl.exp(opened - high[:, None]), axis=1))
        if GATED:
            high = _find_peak(closed)
            below_top, below_sum = _add_sum(below_top, below_sum, high, tl.sum(tl.exp(closed - high[:, None]), axis=1))
        if SAMPLED:
            together = tl.reshape(p, [ROWS, TILE // GROUP, GROUP])
            peak = tl.maximum(tl.max(together, axis=2), -3.4028234e38)
            group = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
            tl.store(
                groups_ptr + line[:, None] * groups_stride + group[None, :],
                peak + tl.log(tl.sum(tl.exp(together - peak[:, :, None]), axis=2)),
                mask=there[:, None],
            )
        if not GATED:
            tl.store(guided_ptr + held, opened, mask=mine)
            tl.store(own, opened, mask=mine & wanted[:, None])
    result = partial_ptr + line * partial_stride + split * 5
    tl.store(result, p_top, mask=there)
    tl.store(result + 1, p_sum, mask=there)
    tl.store(result + 2, q_top, mask=there)
    tl.store(result + 3, q_sum, mask=there)
    tl.store(result + 4, gap_sum, mask=there)
    result = extras_ptr + line * extras_stride + split * 7
    tl.store(result, base_sum, mask=there)
    tl.store(result + 1, above_top, mask=there)
    tl.store(result + 2, above_sum, mask=there)
    tl.store(result + 3, above_at, mask=there)
    tl.store(result + 4, below_top, mask=there)
    tl.store(result + 5, below_sum, mask=there)
    tl.store(result + 6, below_at, mask=there)


@triton.jit
def _merge_sums(tops, sums):
    high = tl.max(tops, axis=0)
    return high, high + tl.log(tl.sum(sums * tl.exp(tops - high), axis=0))


@triton.jit(do_not_specialize=["splits"])
def _settle(
    logits_ptr, logits_stride, rows_ptr, vocabulary, above_ptr, below_ptr, partial_ptr, partial_stride,
    extras_ptr, extras_stride, base_ptr, guided_ptr, splits, threshold_ptr, kl_ptr, estimate_ptr, opened_ptr,
    base_total_ptr, guided_total_ptr, changed_ptr,
    PART: tl.constexpr, SPLITS: tl.constexpr, GATED: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    line, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, _, exact = merge_partial(partial_ptr, partial_stride, splits, line, SPLITS)
    decisive = exact
    if SAMPLED:
        decisive = tl.load(estimate_ptr + line)
    row = tl.load(rows_ptr + line).to(tl.int64)
    healthy = (decisive == decisive) & (exact == exact)
    is_open = healthy
    if GATED:
        is_open = healthy & (decisive > tl.load(threshold_ptr + line))
    on_base = tl.where(is_open, tl.load(above_ptr + 2 * line), tl.load(below_ptr + 2 * line))
    on_policy = tl.where(is_open, tl.load(above_ptr + 2 * line + 1), tl.load(below_ptr + 2 * line + 1))
    # How far the row is from keeping its bits; a row that is nobody's has no KL.
    change = tl.where(healthy, tl.abs(on_base - 1.0) + tl.abs(on_policy), 0.0)
    lost = tl.where(row >= 0, tl.where(healthy, 0, 1), 0)
    if part == 0:
        tl.store(kl_ptr + line, exact)
        tl.store(opened_ptr + line, is_open.to(tl.int32))
        if not SAMPLED:
            tl.store(estimate_ptr + line, exact)
        parts = tl.arange(0, SPLITS)
        real = parts < splits
        extras = extras_ptr + line * extras_stride + parts * 7
        tops = tl.load(partial_ptr + line * partial_stride + parts * 5 + 2, mask=real, other=-3.4028234e38)
        high, base_total = _merge_sums(tops, tl.load(extras, mask=real, other=0.0))
        side = extras + tl.where(is_open, 1, 4)
        own_tops = tl.load(side, mask=real, other=-3.4028234e38)
        best, guided_total = _merge_sums(own_tops, tl.load(side + 1, mask=real, other=0.0))
        at = tl.load(side + 2, mask=real, other=-float("inf"))
        kept = tl.max(tl.where(tops == high, at, -float("inf")), axis=0)
        tl.store(base_total_ptr + line, base_total)
        tl.store(guided_total_ptr + line, tl.where(change > 0.0, guided_total, base_total))
        tl.store(changed_ptr + line, (change > 0.0) & (kept < best))
    held = line * vocabulary
    if GATED:
        entry = part * PART + tl.arange(0, PART)
        inside = entry < vocabulary
        q = tl.load(base_ptr + held + entry, mask=inside, other=-float("inf"))
        value = q
        if change > 0.0:
            p = tl.load(guided_ptr + held + entry, mask=inside, other=-float("inf"))
            value = _mix(q, p, on_base, on_policy)
            tl.store(logits_ptr + row * logits_stride + entry, value, mask=inside)
        tl.store(guided_ptr + held + entry, value, mask=inside)
    elif lost == 1:
        for start in range(0, vocabulary, PART):
            entry = start + tl.arange(0, PART)
            inside = entry < vocabulary
            q = tl.load(base_ptr + held + entry, mask=inside, other=-float("inf"))
            tl.store(guided_ptr + held + entry, q, mask=inside)
            tl.store(logits_ptr + row * logits_stride + entry, q, mask=inside)
