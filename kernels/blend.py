"""Policies mixed into the base's rows: normalisers, KL, its gate and the blended row.

One launch streams base and policy once and leaves partial sums of every split of every row; the last launch merges
them, decides the gate and writes the rows that change. Where the KL is estimated as in the paper, one launch between
draws the samples by inverting the distribution over groups of entries, then within one group.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from steersman.kernels.arguments import LARGEST_SAMPLE, Blended, BlendRows
from steersman.kernels.launch import Launch, is_small, most_splits, require_contiguous, require_rows, split_rows

_TILE = 2048
_PART = 4096
# Sizes that cover most vocabularies, so that few variants are compiled.
_SPLITS = 128
_GROUPS = 8192
GROUP = 32
STATISTICS = 5


@dataclass(frozen=True, slots=True)
class BlendWorkspace:
    """What the launches hand to one another, for up to B rows of V logits."""

    partial: torch.Tensor
    """[B, splits, 5] float32: maximum and Σ exp of the policy's and of the base's logits, and the policy's Σ exp · (its
    logit − the base's), over the tokens that neither masks."""
    groups: torch.Tensor
    """[B, tiles * 64] float32: log Σ exp of the policy's logits over each group of 32 entries."""
    cumulative: torch.Tensor
    """[B, tiles * 64] float32: share of the policy's mass up to and with each group."""


def make_workspace(rows: int, vocabulary: int, device: torch.device) -> BlendWorkspace:
    """Memory for `policy_blend` on up to `rows` rows; one workspace serves one stream."""
    tiles = triton.cdiv(vocabulary, _TILE)
    splits = most_splits(tiles)
    return BlendWorkspace(
        torch.empty(rows, splits, STATISTICS, dtype=torch.float32, device=device),
        torch.empty(rows, tiles * (_TILE // GROUP), dtype=torch.float32, device=device),
        torch.empty(rows, tiles * (_TILE // GROUP), dtype=torch.float32, device=device),
    )


def policy_blend(
    base: torch.Tensor, policy: torch.Tensor, asked: BlendRows, workspace: BlendWorkspace, samples: int = 0
) -> Blended:
    """Writes c₀ log base + c₁ log policy, up to a constant, into rows of `base` [N, V], in place.

    policy: [B, V] logits. samples: 0 decides gates by the exact KL, up to 1024 by the mean log-ratio of so many draws
    of the policy (Shallow Preference Signals, §3.3.2), which depend on the row's seed alone. Entries that either masks
    with -inf are left out of the KL, and masked in the blend where the base masks them or a policy that counts. A row
    whose coefficients are (1, 0) keeps its bits; so does one whose KL is not a number, and it is not open.
    """
    rows = len(policy)
    blended = Blended(
        *(torch.empty(rows, dtype=d, device=base.device) for d in (torch.float32, torch.float32, torch.int32))
    )
    if rows:
        for launch in plan_launches(base, policy, asked, workspace, blended, samples):
            launch.run()
    return blended


def plan_launches(
    base: torch.Tensor,
    policy: torch.Tensor,
    asked: BlendRows,
    workspace: BlendWorkspace,
    blended: Blended,
    samples: int,
) -> list[Launch]:
    """The launches, in order."""
    rows, vocabulary = policy.shape
    require_samples(samples)
    require_rows(base=base, policy=policy)
    require_contiguous(
        rows=asked.rows, threshold=asked.threshold, above=asked.above, below=asked.below, seeds=asked.seeds
    )
    tiles = triton.cdiv(vocabulary, _TILE)
    split = split_rows(rows, tiles)
    logits = dict(
        base=base, base_stride=base.stride(0), policy=policy, policy_stride=policy.stride(0), rows=asked.rows,
        vocabulary=vocabulary,
    )  # fmt: skip
    merged = dict(partial=workspace.partial, partial_stride=workspace.partial.stride(0), splits=split.splits)
    splits = max(_SPLITS, triton.next_power_of_2(split.splits))
    stream = Launch(
        _stream,
        (rows, split.splits),
        dict(
            **logits, tiles=tiles, tiles_each=split.tiles_each, partial=workspace.partial,
            partial_stride=workspace.partial.stride(0), groups=workspace.groups,
            groups_stride=workspace.groups.stride(0),
        ),
        dict(TILE=_TILE, GROUP=GROUP, SAMPLED=samples > 0),
        warps=4 if is_small() else 8,
    )  # fmt: skip
    blend = Launch(
        _blend,
        (rows, triton.cdiv(vocabulary, _PART)),
        dict(
            **logits, **merged, threshold=asked.threshold, above=asked.above, below=asked.below, kl=blended.kl,
            estimate=blended.estimate, opened=blended.opened,
        ),
        dict(PART=_PART, SPLITS=splits, SAMPLED=samples > 0),
        warps=8,
    )  # fmt: skip
    if not samples:
        return [stream, blend]
    return [stream, plan_sample(base, policy, asked, workspace, split.splits, splits, samples, blended.estimate), blend]


def require_samples(samples: int) -> None:
    """Raises ValueError for more draws than a kernel makes."""
    if not 0 <= samples <= LARGEST_SAMPLE:
        raise ValueError(f"samples: {samples} is not between 0 and {LARGEST_SAMPLE}")


def plan_sample(
    base: torch.Tensor, policy: torch.Tensor, asked: BlendRows, workspace: BlendWorkspace, splits: int, bucket: int,
    samples: int, estimate: torch.Tensor,
) -> Launch:  # fmt: skip
    """The launch that writes `estimate` [B], of so many samples, once `workspace` holds the groups of every row and the
    partial sums of `splits` splits, which are compiled for up to `bucket`."""
    rows, vocabulary = policy.shape
    groups = triton.cdiv(vocabulary, GROUP)
    padded = max(_GROUPS, triton.next_power_of_2(groups))
    return Launch(
        _sample,
        (rows,),
        dict(
            base=base, base_stride=base.stride(0), policy=policy, policy_stride=policy.stride(0), rows=asked.rows,
            vocabulary=vocabulary, partial=workspace.partial, partial_stride=workspace.partial.stride(0),
            splits=splits, groups=workspace.groups, cumulative=workspace.cumulative,
            groups_stride=workspace.groups.stride(0), count=groups, seeds=asked.seeds, samples=samples,
            estimate=estimate,
        ),
        dict(GROUPS=padded, STEPS=padded.bit_length(), GROUP=GROUP, SAMPLES=LARGEST_SAMPLE, SPLITS=bucket),
        warps=8,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tiles", "tiles_each"])
def _stream(
    base, base_stride, policy, policy_stride, rows, vocabulary, tiles, tiles_each,
    partial, partial_stride, groups, groups_stride,
    TILE: tl.constexpr, GROUP: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    line, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.maximum(tl.load(rows + line), 0).to(tl.int64)
    # The lowest finite float, not -inf: a difference from it is never NaN.
    p_top = tl.full([TILE], -3.4028234e38, tl.float32)
    q_top = tl.full([TILE], -3.4028234e38, tl.float32)
    p_sum = tl.zeros([TILE], tl.float32)
    q_sum = tl.zeros([TILE], tl.float32)
    gap_sum = tl.zeros([TILE], tl.float32)
    for tile in range(split * tiles_each, tl.minimum((split + 1) * tiles_each, tiles)):
        entries = tile * TILE + tl.arange(0, TILE)
        inside = entries < vocabulary
        q = tl.load(base + row * base_stride + entries, mask=inside, other=-float("inf")).to(tl.float32)
        p = tl.load(policy + line * policy_stride + entries, mask=inside, other=-float("inf")).to(tl.float32)
        masked = (p == -float("inf")) | (q == -float("inf"))
        p = tl.where(masked, -float("inf"), p)
        q = tl.where(masked, -float("inf"), q)
        gap = tl.where(masked, 0.0, p - q)
        rise = p - p_top
        scale = tl.exp(-tl.abs(rise))
        kept = tl.where(rise > 0, scale, 1.0)
        added = tl.where(rise > 0, 1.0, scale)
        p_sum = p_sum * kept + added
        gap_sum = gap_sum * kept + added * gap
        p_top = tl.where(rise > 0, p, p_top)
        rise = q - q_top
        scale = tl.exp(-tl.abs(rise))
        q_sum = tl.where(rise > 0, q_sum * scale + 1.0, q_sum + scale)
        q_top = tl.where(rise > 0, q, q_top)
        if SAMPLED:
            together = tl.reshape(p, [TILE // GROUP, GROUP])
            peak = tl.maximum(tl.max(together, axis=1), -3.4028234e38)
            mass = peak + tl.log(tl.sum(tl.exp(together - peak[:, None]), axis=1))
            tl.store(groups + line * groups_stride + tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP), mass)
    p_high, q_high = tl.max(p_top, axis=0), tl.max(q_top, axis=0)
    p_scale = tl.exp(p_top - p_high)
    result = partial + line * partial_stride + split * 5
    tl.store(result, p_high)
    tl.store(result + 1, tl.sum(p_sum * p_scale, axis=0))
    tl.store(result + 2, q_high)
    tl.store(result + 3, tl.sum(q_sum * tl.exp(q_top - q_high), axis=0))
    tl.store(result + 4, tl.sum(gap_sum * p_scale, axis=0))


@triton.jit
def merge_partial(partial, partial_stride, splits, line, SPLITS: tl.constexpr):
    """log Σ exp of policy and base, and KL(policy‖base), of one row."""
    parts = tl.arange(0, SPLITS)
    there = parts < splits
    places = partial + line * partial_stride + parts * 5
    p_tops = tl.load(places, mask=there, other=-3.4028234e38)
    q_tops = tl.load(places + 2, mask=there, other=-3.4028234e38)
    p_high, q_high = tl.max(p_tops, axis=0), tl.max(q_tops, axis=0)
    p_scale = tl.exp(p_tops - p_high)
    p_sum = tl.sum(tl.load(places + 1, mask=there, other=0.0) * p_scale, axis=0)
    gap = tl.sum(tl.load(places + 4, mask=there, other=0.0) * p_scale, axis=0)
    q_sum = tl.sum(tl.load(places + 3, mask=there, other=0.0) * tl.exp(q_tops - q_high), axis=0)
    p_total, q_total = p_high + tl.log(p_sum), q_high + tl.log(q_sum)
    return p_total, q_total, gap / p_sum - (p_total - q_total)


@triton.jit(do_not_specialize=["splits", "count", "samples"])
def _sample(
    base, base_stride, policy, policy_stride, rows, vocabulary, partial, partial_stride, splits,
    groups, cumulative, groups_stride, count, seeds, samples, estimate,
    GROUPS: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr, SAMPLES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    row = tl.maximum(tl.load(rows + line), 0).to(tl.int64)
    p_total, q_total, _ = merge_partial(partial, partial_stride, splits, line, SPLITS)
    places = tl.arange(0, GROUPS)
    mass = tl.load(groups + line * groups_stride + places, mask=places < count, other=-float("inf"))
    running = tl.cumsum(tl.exp(mass - p_total), axis=0)
    tl.store(cumulative + line * groups_stride + places, running, mask=places < count)
    tl.debug_barrier()

    draws = tl.arange(0, SAMPLES)
    # Scaled by the last sum, which rounding leaves next to 1.
    whole = tl.load(cumulative + line * groups_stride + count - 1)
    aim = tl.rand(tl.load(seeds + line), draws) * whole
    low, high = tl.zeros([SAMPLES], tl.int32), tl.zeros([SAMPLES], tl.int32) + (count - 1)
    for _ in range(STEPS):
        middle = (low + high) // 2
        reached = tl.load(cumulative + line * groups_stride + middle) > aim
        high = tl.where(reached, middle, high)
        low = tl.where(reached, low, tl.minimum(middle + 1, high))
    before = tl.load(cumulative + line * groups_stride + high - 1, mask=high > 0, other=0.0)
    left = aim - before
    chosen_p = tl.full([SAMPLES], -float("inf"), tl.float32)
    chosen_q = tl.zeros([SAMPLES], tl.float32)
    found = tl.zeros([SAMPLES], tl.int32)
    for n in range(GROUP):
        entry = high * GROUP + n
        inside = entry < vocabulary
        p = tl.load(policy + line * policy_stride + entry, mask=inside, other=-float("inf")).to(tl.float32)
        q = tl.load(base + row * base_stride + entry, mask=inside, other=-float("inf")).to(tl.float32)
        open = (p != -float("inf")) & (q != -float("inf"))
        # The last entry with mass is taken where rounding leaves a remainder behind the group.
        take = open & (found == 0)
        chosen_p = tl.where(take, p, chosen_p)
        chosen_q = tl.where(take, q, chosen_q)
        left -= tl.where(open, tl.exp(p - p_total), 0.0)
        found = tl.where(open & (left < 0.0), 1, found)
    ratio = tl.where(draws < samples, chosen_p - p_total - chosen_q + q_total, 0.0)
    tl.store(estimate + line, tl.sum(ratio, axis=0) / samples)


@triton.jit(do_not_specialize=["splits"])
def _blend(
    base, base_stride, policy, policy_stride, rows, vocabulary, partial, partial_stride, splits,
    threshold, above, below, kl, estimate, opened,
    PART: tl.constexpr, SPLITS: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    line, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, _, exact = merge_partial(partial, partial_stride, splits, line, SPLITS)
    decisive = exact
    if SAMPLED:
        decisive = tl.load(estimate + line)
    is_open = decisive > tl.load(threshold + line)
    if part == 0:
        tl.store(kl + line, exact)
        tl.store(opened + line, is_open.to(tl.int32))
        if not SAMPLED:
            tl.store(estimate + line, exact)
    on_base = tl.where(is_open, tl.load(above + 2 * line), tl.load(below + 2 * line))
    on_policy = tl.where(is_open, tl.load(above + 2 * line + 1), tl.load(below + 2 * line + 1))
    row = tl.load(rows + line).to(tl.int64)
    # How far the row is from keeping its bits; -1 where the KL is not a number, or nobody asks for the row.
    change = tl.where(decisive == decisive, tl.abs(on_base - 1.0) + tl.abs(on_policy), -1.0)
    if tl.where(row >= 0, change, -1.0) > 0.0:
        entries = part * PART + tl.arange(0, PART)
        inside = entries < vocabulary
        q = tl.load(base + row * base_stride + entries, mask=inside, other=-float("inf")).to(tl.float32)
        p = tl.load(policy + line * policy_stride + entries, mask=inside, other=-float("inf")).to(tl.float32)
        q_masked, p_masked = q == -float("inf"), tl.where(on_policy != 0.0, p, 0.0) == -float("inf")
        value = on_base * tl.where(q_masked, 0.0, q) + on_policy * tl.where(p == -float("inf"), 0.0, p)
        value = tl.where(q_masked | p_masked, -float("inf"), value)
        tl.store(base + row * base_stride + entries, value.to(base.dtype.element_ty), mask=inside)
