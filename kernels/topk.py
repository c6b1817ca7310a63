"""The k most likely tokens of every row with their log-probabilities, in one pass over the logits.

The k largest entries lie inside the k groups that have the largest maxima. One streaming launch writes the maxima of
groups of 16 entries and of 16 groups, and the partial sums of the normaliser; a second one, a program a row, walks down
from the k best groups of groups to the k best entries with three small top-k's. Every comparison is of (value
descending, id ascending), packed into one integer, so that ties never depend on how the work was split.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from steersman.kernels.launch import Launch, Split, most_splits, require_rows, split_rows

GROUP = 16
"""Entries of a group, and groups of a group of groups."""
TILE = 4096
"""Entries that are read at once."""
# Sizes that cover most vocabularies, so that few variants are compiled.
_SPLITS = 64
_SUMMITS = (256, 1024)
LARGEST_K = 64


@dataclass(frozen=True, slots=True)
class TopKWorkspace:
    """What the two launches hand to one another, for up to B rows of V logits."""

    maxima: torch.Tensor
    """[B, tiles * 256] int32: largest ordered key of every group."""
    summits: torch.Tensor
    """[B, tiles * 16] int32: largest ordered key of every group of groups."""
    partial: torch.Tensor
    """[B, splits, 2] float32: maximum and Σ exp(logit − maximum) of every split."""
    chosen: torch.Tensor
    """[B, 64] int32: groups that a level hands to the next."""


def make_workspace(rows: int, vocabulary: int, device: torch.device) -> TopKWorkspace:
    """Memory for `topk_logprobs` on up to `rows` rows; one workspace serves one stream."""
    tiles = triton.cdiv(vocabulary, TILE)
    splits = most_splits(tiles)
    return TopKWorkspace(
        torch.empty(rows, tiles * (TILE // GROUP), dtype=torch.int32, device=device),
        torch.empty(rows, tiles * (TILE // GROUP**2), dtype=torch.int32, device=device),
        torch.empty(rows, splits, 2, dtype=torch.float32, device=device),
        torch.empty(rows, LARGEST_K, dtype=torch.int32, device=device),
    )


def topk_logprobs(
    logits: torch.Tensor, k: int, workspace: TopKWorkspace
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits: [B, V] float32, bfloat16 or float16, rows contiguous, -inf where masked. k: 1 to 64, at most V.

    Returns ids [B, k] int32, log-probabilities [B, k] float32 and log-sum-exps [B] float32; value descending, ties by
    lower id. A masked entry has the log-probability -inf; a row without any other has -inf throughout. A row with NaN
    has NaN for its log-sum-exp and its log-probabilities.
    """
    rows = len(logits)
    ids = torch.empty(rows, k, dtype=torch.int32, device=logits.device)
    logprobs = torch.empty(rows, k, dtype=torch.float32, device=logits.device)
    totals = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        for launch in plan_launches(logits, k, workspace, ids, logprobs, totals):
            launch.run()
    return ids, logprobs, totals


def plan_launches(
    logits: torch.Tensor,
    k: int,
    workspace: TopKWorkspace,
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    totals: torch.Tensor,
) -> list[Launch]:
    """The two launches, in order."""
    rows, vocabulary = logits.shape
    if not 1 <= k <= min(LARGEST_K, vocabulary):
        raise ValueError(f"k: {k} is not between 1 and {min(LARGEST_K, vocabulary)}")
    require_rows(logits=logits)
    tiles = triton.cdiv(vocabulary, TILE)
    split: Split = split_rows(rows, tiles)
    summits = triton.cdiv(vocabulary, GROUP**2)
    bucket = max(triton.next_power_of_2(k), 8)
    scan = Launch(
        _scan,
        (rows, split.splits),
        dict(
            logits=logits, stride=logits.stride(0), vocabulary=vocabulary, tiles=tiles, tiles_each=split.tiles_each,
            maxima=workspace.maxima, maxima_stride=workspace.maxima.stride(0),
            summits=workspace.summits, summits_stride=workspace.summits.stride(0),
            partial=workspace.partial, partial_stride=workspace.partial.stride(0),
        ),
        dict(TILE=TILE, GROUP=GROUP),
        warps=8,
    )  # fmt: skip
    finish = Launch(
        _finish,
        (rows,),
        dict(
            logits=logits, stride=logits.stride(0), vocabulary=vocabulary, k=k, splits=split.splits,
            count=summits,
            maxima=workspace.maxima, maxima_stride=workspace.maxima.stride(0),
            summits=workspace.summits, summits_stride=workspace.summits.stride(0),
            partial=workspace.partial, partial_stride=workspace.partial.stride(0), chosen=workspace.chosen,
            ids=ids, logprobs=logprobs, totals=totals,
        ),
        dict(
            K=bucket, SUMMITS=choose_bucket(summits, _SUMMITS), GROUP=GROUP,
            SPLITS=max(_SPLITS, triton.next_power_of_2(split.splits)), LARGEST_K=LARGEST_K,
        ),
        warps=4,
    )  # fmt: skip
    return [scan, finish]


def choose_bucket(size: int, buckets: tuple[int, ...]) -> int:
    """The first bucket that holds `size`, or the next power of 2 where none does."""
    return next((bucket for bucket in buckets if bucket >= size), triton.next_power_of_2(size))


@triton.jit
def _order(values):
    """Integers that compare as the floats do, NaN above all: [n] float32 → [n] int32."""
    # Adding 0 makes the two zeros one.
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(values != values, 0x7FFFFFFF, keys)


@triton.jit
def _pack(keys, places):
    """One integer that compares by key, then by lower place."""
    return (keys.to(tl.int64) << 32) | (0x7FFFFFFF - places).to(tl.int64)


@triton.jit
def _place(packed):
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def unpack(packed):
    """Entries and values [n] of what `find_best` gives."""
    keys = (packed >> 32).to(tl.int32)
    return _place(packed), (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def scan_tiles(
    row, readable, vocabulary, first, last, maxima, summits, partial, TILE: tl.constexpr, GROUP: tl.constexpr
):
    """Reads the tiles from `first` to `last` of a row, of which entries from `readable` on count as masked; writes its
    maxima of groups, and of groups of groups, and the tiles' part of the normaliser."""
    GROUPS: tl.constexpr = TILE // GROUP
    SUMMITS: tl.constexpr = GROUPS // GROUP
    # The lowest finite float, not -inf: a difference from it is never NaN.
    top = tl.full([TILE], -3.4028234e38, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for tile in range(first, last):
        entries = tile * TILE + tl.arange(0, TILE)
        values = tl.load(row + entries, mask=entries < readable, other=-float("inf")).to(tl.float32)
        rise = values - top
        scale = tl.exp(-tl.abs(rise))
        total = tl.where(rise > 0, total * scale + 1.0, total + scale)
        top = tl.where(rise > 0, values, top)
        keys = tl.where(entries < vocabulary, _order(values), -0x80000000)
        groups = tl.max(tl.reshape(keys, [GROUPS, GROUP]), axis=1)
        tl.store(maxima + tile * GROUPS + tl.arange(0, GROUPS), groups)
        peaks = tl.max(tl.reshape(groups, [SUMMITS, GROUP]), axis=1)
        tl.store(summits + tile * SUMMITS + tl.arange(0, SUMMITS), peaks)
    highest = tl.max(top, axis=0)
    tl.store(partial, highest)
    tl.store(partial + 1, tl.sum(total * tl.exp(top - highest), axis=0))


@triton.jit
def merge_normaliser(partial, splits, SPLITS: tl.constexpr):
    """The log-sum-exp of a row from its parts."""
    parts = tl.arange(0, SPLITS)
    there = parts < splits
    tops = tl.load(partial + 2 * parts, mask=there, other=-3.4028234e38)
    sums = tl.load(partial + 2 * parts + 1, mask=there, other=0.0)
    highest = tl.max(tops, axis=0)
    return highest + tl.log(tl.sum(sums * tl.exp(tops - highest), axis=0))


@triton.jit
def find_best(
    row, readable, vocabulary, first, last, maxima, summits, chosen,
    K: tl.constexpr, SUMMITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The K best entries below the summits from `first` to `last` of a scanned row, packed, best first; where there are
    fewer, the rest are lower than any of them. chosen: room for K groups, which a level hands to the next."""
    picked = tl.arange(0, K)
    if SUMMITS > K:
        places = first + tl.arange(0, SUMMITS)
        keys = tl.load(summits + places, mask=places < last, other=-0x80000000)
        best = _place(tl.topk(_pack(keys, places), K))
        tl.store(chosen + picked, best)
        tl.debug_barrier()
        spread = tl.arange(0, K * GROUP)
        parents = tl.load(chosen + spread // GROUP)
    else:
        spread = tl.arange(0, SUMMITS * GROUP)
        parents = first + spread // GROUP
    places = parents * GROUP + spread % GROUP
    keys = tl.load(maxima + places, mask=parents < last, other=-0x80000000)
    best = _place(tl.topk(_pack(keys, places), K))
    tl.debug_barrier()
    tl.store(chosen + picked, best)
    tl.debug_barrier()

    spread = tl.arange(0, K * GROUP)
    parents = tl.load(chosen + spread // GROUP)
    places = parents * GROUP + spread % GROUP
    inside = (parents < last * GROUP) & (places < vocabulary)
    values = tl.load(row + places, mask=inside & (places < readable), other=-float("inf")).to(tl.float32)
    return tl.topk(_pack(tl.where(inside, _order(values), -0x80000000), places), K)


@triton.jit(do_not_specialize=["tiles", "tiles_each"])
def _scan(
    logits, stride, vocabulary, tiles, tiles_each,
    maxima, maxima_stride, summits, summits_stride, partial, partial_stride,
    TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scan_tiles(
        logits + row * stride, vocabulary, vocabulary,
        split * tiles_each, tl.minimum((split + 1) * tiles_each, tiles),
        maxima + row * maxima_stride, summits + row * summits_stride, partial + row * partial_stride + split * 2,
        TILE, GROUP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["k", "splits", "count"])
def _finish(
    logits, stride, vocabulary, k, splits, count,
    maxima, maxima_stride, summits, summits_stride, partial, partial_stride, chosen,
    ids, logprobs, totals,
    K: tl.constexpr, SUMMITS: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, LARGEST_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    normaliser = merge_normaliser(partial + row * partial_stride, splits, SPLITS)
    tl.store(totals + row, normaliser)
    packed = find_best(
        logits + row * stride, vocabulary, vocabulary, 0, count, maxima + row * maxima_stride,
        summits + row * summits_stride, chosen + row * LARGEST_K, K, SUMMITS, GROUP,
    )  # fmt: skip
    places, values = unpack(packed)
    picked = tl.arange(0, K)
    wanted = picked < k
    tl.store(ids + row * k + picked, places, mask=wanted)
    tl.store(logprobs + row * k + picked, tl.where(values == -float("inf"), values, values - normaliser), mask=wanted)
