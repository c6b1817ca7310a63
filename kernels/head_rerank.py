"""A step that reward heads guide, in two launches: candidates, their rewards U[v] · f(h) + c[v], and the row in place.

The first one scans the logits as `topk_logprobs` does, and each of its programs also finds the k best entries of its
own part of the row. In the second one every program merges these, reads the candidates' rows of every head's U, and
scores all of its row's candidates, which is little work and stays in the cache; then it fills its own part of the row
with -inf and writes the candidates that lie there. It reads no logits, which another program of the row may have
written by then: that is why each part's best entries are found before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from steersman.kernels.arguments import HeadReranked, HeadRows, HeadWeights
from steersman.kernels.launch import Launch, Split, require_contiguous, require_rows, split_rows
from steersman.kernels.rerank import add_term, settle
from steersman.kernels.topk import (
    GROUP,
    LARGEST_K,
    TILE,
    TopKWorkspace,
    choose_bucket,
    find_best,
    merge_normaliser,
    scan_tiles,
    unpack,
)
from steersman.kernels.topk import make_workspace as make_topk_workspace

_PART = 4096
"""Entries that are filled at once."""
_SPLITS = (8, 32)
"""Parts of a row whose best entries are merged, the second one at most."""
_SMALLEST_K = 16
_PRODUCTS = 2048
"""Weights that are multiplied at once: of K candidates, _PRODUCTS / K channels each."""
_TILES_EACH = (1, 16)
"""Of a part; more than 16 only where a row would have more than 32 parts otherwise."""
_REGISTERS = 128
"""A thread's at most: with the bound that it chooses itself, the compiler spills a few."""
_COLUMNS = 6
"""Numbers of a head in the table."""


@dataclass(frozen=True, slots=True)
class HeadRerankWorkspace:
    """What the two launches hand to one another, for up to B rows of V logits."""

    topk: TopKWorkspace
    """Maxima and partial sums, as between the launches of `topk_logprobs`."""
    chosen: torch.Tensor
    """[B, 32, 64] int32: groups that a level of a part's search hands to the next."""
    best: torch.Tensor
    """[B, 32, 64] int64: the best entries of every part, packed."""


def make_workspace(rows: int, vocabulary: int, device: torch.device) -> HeadRerankWorkspace:
    """Memory for `head_rerank` on up to `rows` rows; one workspace serves one stream."""
    return HeadRerankWorkspace(
        make_topk_workspace(rows, vocabulary, device),
        torch.empty(rows, _SPLITS[-1], LARGEST_K, dtype=torch.int32, device=device),
        torch.empty(rows, _SPLITS[-1], LARGEST_K, dtype=torch.int64, device=device),
    )


def tabulate_heads(heads: Sequence[HeadWeights]) -> list[list[int]]:
    """[M, 6]: addresses of U and c, distance of U's rows, V and R of each head, and the first of its columns in the
    features of all. It holds for as long as the heads' memory does. Raises ValueError where the heads differ in
    precision, or a kernel cannot read them as they lie."""
    first, table = 0, []
    for head in heads:
        if head.tokens.dtype is not heads[0].tokens.dtype or head.bias.dtype is not heads[0].tokens.dtype:
            raise ValueError(f"heads: {head.tokens.dtype} beside {heads[0].tokens.dtype}; one precision for all")
        require_rows(tokens=head.tokens)
        require_contiguous(bias=head.bias)
        width, rank = head.tokens.shape
        table.append([head.tokens.data_ptr(), head.bias.data_ptr(), head.tokens.stride(0), width, rank, first])
        first += rank
    return table


def head_rerank(
    logits: torch.Tensor, features: torch.Tensor, asked: HeadRows, workspace: HeadRerankWorkspace
) -> HeadReranked:
    """Chooses each row's k best tokens, scores them by heads and writes log π up to a constant into rows of `logits`
    [N, V] float32, bfloat16 or float16, in place: what `topk_logprobs`, `gather_outputs` for each head and
    `reward_rerank` do one after another.

    features: [G, ΣR] float32, f(h) of every head side by side. asked: its rows differ from one another, and its k is 1
    to 64 and at most V; its table is that of `tabulate_heads` on the logits' device. Candidates beyond a row's limit,
    and tokens that one of the heads does not have, are masked. Of a line whose row is below 0 all logits count as
    masked. A row that cannot be scored keeps its bits, and so do rows that are not asked for. Raises ValueError for
    another k and for strides that the kernels cannot read.
    """
    lines, k = len(asked.rows), asked.k

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=logits.device)

    done = HeadReranked(
        ids=empty(lines, k, dtype=torch.int64), values=empty(lines, k), logprobs=empty(lines, k),
        scores=empty(lines, k), rewards=empty(lines, len(asked.heads), k), broken=empty(lines, dtype=torch.bool),
    )  # fmt: skip
    if lines:
        for launch in plan_launches(logits, features, asked, workspace, done):
            launch.run()
    return done


def plan_launches(
    logits: torch.Tensor,
    features: torch.Tensor,
    asked: HeadRows,
    workspace: HeadRerankWorkspace,
    done: HeadReranked,
) -> list[Launch]:
    """The two launches, in order."""
    (lines, k), vocabulary = done.ids.shape, logits.shape[1]
    if not 1 <= k <= min(LARGEST_K, vocabulary):
        raise ValueError(f"k: {k} is not between 1 and {min(LARGEST_K, vocabulary)}")
    if asked.table is None:
        raise ValueError("asked: it has no table of its heads on the logits' device")
    terms = asked.terms
    require_rows(logits=logits, features=features)
    require_contiguous(
        rows=asked.rows, limits=asked.limits, table=asked.table, strength=terms.strength, scale=terms.scale,
        shift=terms.shift, log_sigmoid=terms.log_sigmoid, ids=done.ids, values=done.values, logprobs=done.logprobs,
        scores=done.scores, rewards=done.rewards, broken=done.broken,
    )  # fmt: skip
    split, maxima, summits = _split(lines, vocabulary), workspace.topk.maxima, workspace.topk.summits
    partial, best = workspace.topk.partial, workspace.best
    bucket = max(_SMALLEST_K, triton.next_power_of_2(k))
    shared = dict(
        logits_ptr=logits, logits_stride=logits.stride(0), vocabulary=vocabulary, rows_ptr=asked.rows,
        partial_ptr=partial, partial_stride=partial.stride(0), best_ptr=best,
    )  # fmt: skip
    scan = Launch(
        _scan_best,
        (lines, split.splits),
        dict(
            **shared, tiles=triton.cdiv(vocabulary, TILE), tiles_each=split.tiles_each,
            maxima_ptr=maxima, maxima_stride=maxima.stride(0), summits_ptr=summits, summits_stride=summits.stride(0),
            chosen_ptr=workspace.chosen,
        ),
        dict(
            TILE=TILE, GROUP=GROUP, K=bucket, SPLITS=_SPLITS[-1], LARGEST_K=LARGEST_K,
            SUMMITS=choose_bucket(split.tiles_each, _TILES_EACH) * (TILE // GROUP**2),
        ),
        warps=8,
        registers=_REGISTERS,
    )  # fmt: skip
    parts = split_rows(lines, triton.cdiv(vocabulary, _PART))
    rerank = Launch(
        _head_rerank,
        (lines, parts.splits),
        dict(
            **shared, limits_ptr=asked.rows if asked.limits is None else asked.limits,
            has_limits=int(asked.limits is not None), k=k, splits=split.splits, parts_each=parts.tiles_each,
            table_ptr=asked.table, weight_ptr=asked.heads[0].tokens, features_ptr=features,
            features_stride=features.stride(0), terms=len(asked.heads), strength_ptr=terms.strength,
            scale_ptr=terms.scale, shift_ptr=terms.shift, log_sigmoid_ptr=terms.log_sigmoid, ids_ptr=done.ids,
            values_ptr=done.values, logprobs_ptr=done.logprobs, scores_ptr=done.scores, rewards_ptr=done.rewards,
            broken_ptr=done.broken,
        ),
        dict(
            K=bucket, MERGED=choose_bucket(split.splits, _SPLITS), SPLITS=_SPLITS[-1], LARGEST_K=LARGEST_K,
            DEPTH=_PRODUCTS // bucket, PART=_PART, COLUMNS=_COLUMNS, ALIGNED=_are_aligned(asked.heads),
        ),
        warps=4,
        registers=_REGISTERS,
    )  # fmt: skip
    return [scan, rerank]


def _split(lines: int, vocabulary: int) -> Split:
    """As the logits of `topk_logprobs` are split, within the bounds that keep the searches in the parts small."""
    tiles = triton.cdiv(vocabulary, TILE)
    each = max(min(split_rows(lines, tiles).tiles_each, _TILES_EACH[-1]), triton.cdiv(tiles, _SPLITS[-1]))
    return Split(triton.cdiv(tiles, each), each)


def _are_aligned(heads: Sequence[HeadWeights]) -> bool:
    """Whether 16 bytes of U can be read at once, as where `dispatch.choose_rank` chose the ranks."""
    sizes = (number for head in heads for number in (*head.tokens.shape[1:], head.tokens.stride(0)))
    return all(head.tokens.data_ptr() % 16 == 0 for head in heads) and all(size % 16 == 0 for size in sizes)


@triton.jit(do_not_specialize=["tiles", "tiles_each"])
def _scan_best(
    logits_ptr, logits_stride, vocabulary, rows_ptr, partial_ptr, partial_stride, best_ptr, tiles, tiles_each,
    maxima_ptr, maxima_stride, summits_ptr, summits_stride, chosen_ptr,
    TILE: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, SUMMITS: tl.constexpr, SPLITS: tl.constexpr,
    LARGEST_K: tl.constexpr,
):  # fmt: skip
    line, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    maxima, summits = maxima_ptr + line * maxima_stride, summits_ptr + line * summits_stride
    first, last = split * tiles_each, tl.minimum((split + 1) * tiles_each, tiles)
    partial = partial_ptr + line * partial_stride + split * 2
    place = tl.load(rows_ptr + line).to(tl.int64)
    row, readable = logits_ptr + place * logits_stride, tl.where(place < 0, 0, vocabulary)
    scan_tiles(row, readable, vocabulary, first, last, maxima, summits, partial, TILE, GROUP)
    # What follows reads the maxima that other threads have written.
    tl.debug_barrier()
    EACH: tl.constexpr = TILE // GROUP // GROUP
    own = (line * SPLITS + split) * LARGEST_K
    best = find_best(
        row, readable, vocabulary, first * EACH, last * EACH, maxima, summits, chosen_ptr + own, K, SUMMITS, GROUP
    )
    tl.store(best_ptr + own + tl.arange(0, K), best)


@triton.jit
def _multiply(row, weight, tokens, there, rank, K: tl.constexpr, DEPTH: tl.constexpr):
    """Dot products [K] of a row of features with rows of a weight: of pointers to each, both contiguous."""
    total = tl.zeros([K], tl.float32)
    for start in range(0, rank, DEPTH):
        channels = start + tl.arange(0, DEPTH)
        inside = channels < rank
        features = tl.load(row + channels, mask=inside, other=0.0)
        own = tl.load(
            weight + tokens[:, None] + channels[None, :], mask=there[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        total += tl.sum(own * features[None, :], axis=1)
    return total


@triton.jit(do_not_specialize=["has_limits", "k", "splits", "parts_each", "terms"])
def _head_rerank(
    logits_ptr, logits_stride, vocabulary, rows_ptr, partial_ptr, partial_stride, best_ptr, limits_ptr, has_limits, k,
    splits, parts_each, table_ptr, weight_ptr, features_ptr, features_stride, terms, strength_ptr, scale_ptr,
    shift_ptr, log_sigmoid_ptr, ids_ptr, values_ptr, logprobs_ptr, scores_ptr, rewards_ptr, broken_ptr,
    K: tl.constexpr, MERGED: tl.constexpr, SPLITS: tl.constexpr, LARGEST_K: tl.constexpr, DEPTH: tl.constexpr,
    PART: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    line, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    candidates = tl.arange(0, K)
    there = candidates < k
    normaliser = merge_normaliser(partial_ptr + line * partial_stride, splits, MERGED)
    spread = tl.arange(0, MERGED * K)
    places = (line * SPLITS + spread // K) * LARGEST_K + spread % K
    known = tl.load(best_ptr + places, mask=spread < splits * K, other=-0x8000000000000000)
    chosen, values = unpack(tl.topk(known, K))
    # A row with NaN has no order.
    values = tl.where(normaliser != normaliser, float("nan"), values)
    limit = k
    if has_limits == 1:
        limit = tl.minimum(tl.load(limits_ptr + line), k).to(tl.int32)
    values = tl.where(candidates < limit, values, -float("inf"))
    logprobs = tl.where(values == -float("inf"), values, values - normaliser)

    score = values
    for term in range(terms):
        head = table_ptr + term * COLUMNS
        weight, bias = tl.load(head).to(weight_ptr.dtype), tl.load(head + 1).to(weight_ptr.dtype)
        stride, width = tl.load(head + 2), tl.load(head + 3).to(tl.int32)
        rank, first = tl.load(head + 4).to(tl.int32), tl.load(head + 5)
        if ALIGNED:
            weight, stride = tl.multiple_of(weight, 16), tl.multiple_of(stride, 16)
            rank, first = tl.multiple_of(rank, 16), tl.multiple_of(first, 16)
        tokens = tl.minimum(chosen, width - 1).to(tl.int64)
        row = features_ptr + line * features_stride + first
        reward = _multiply(row, weight, tokens * stride, there, rank, K, DEPTH)
        reward += tl.load(bias + tokens, mask=there, other=0.0).to(tl.float32)
        place = line * terms + term
        if part == 0:
            tl.store(rewards_ptr + place * k + candidates, reward, mask=there)
        score = add_term(score, reward, place, strength_ptr, scale_ptr, shift_ptr, log_sigmoid_ptr)
        values = tl.where(chosen < width, values, -float("inf"))
    score, healthy = settle(values, score)

    own = line * k + candidates
    if part == 0:
        tl.store(ids_ptr + own, chosen.to(tl.int64), mask=there)
        tl.store(values_ptr + own, values, mask=there)
        tl.store(logprobs_ptr + own, logprobs, mask=there)
        tl.store(scores_ptr + own, tl.where(healthy == 1, score, float("nan")), mask=there)
        tl.store(broken_ptr + line, healthy == 0)
    place = tl.load(rows_ptr + line).to(tl.int64)
    if (place >= 0) & (healthy == 1):
        row = logits_ptr + place * logits_stride
        nothing = tl.full([PART], -float("inf"), logits_ptr.dtype.element_ty)
        begin = part * parts_each * PART
        end = tl.minimum(begin + parts_each * PART, vocabulary)
        for start in range(begin, end, PART):
            entries = start + tl.arange(0, PART)
            tl.store(row + entries, nothing, mask=entries < end)
        tl.debug_barrier()
        mine = there & (chosen >= begin) & (chosen < end)
        tl.store(row + chosen, score.to(logits_ptr.dtype.element_ty), mask=mine)
