"""Every launch that a server makes: compiled and checked without a GPU in the tests, and compiled at a server's start.

A launch's variants come from data types, bucketed sizes and whether strides are multiples of 16; numbers that change
from step to step make none.
"""

from collections.abc import Iterator, Mapping

import torch
import triton

from steersman.kernels import attention, blend, gather, head_blend, head_rerank, rerank, topk
from steersman.kernels.arguments import (
    Blended,
    BlendedRows,
    BlendRows,
    HeadReranked,
    HeadRows,
    HeadWeights,
    RewardTerms,
)
from steersman.kernels.launch import Launch

VOCABULARIES = (32_000, 128_256)
"""One of each bucket of sizes: up to 65,536 entries, and up to 262,144."""
_ROWS = 8
_DEVICE = torch.device("meta")
_PADDING = 64
"""vLLM pads vocabularies to multiples of it; where it takes the padding off again, rows keep their distance."""


def production_launches() -> dict[str, Launch]:
    """Name → launch, over tensors without memory, for vocabularies and models of the usual sizes."""
    launches = dict(named for vocabulary in VOCABULARIES for named in _sampling(vocabulary, vocabulary))
    for dtype in (torch.bfloat16, torch.float32):
        for width in (64, 128):
            launches |= attention_launches(dtype, width, heads=2, shared=7)
    for dtype in (torch.bfloat16, torch.float32):
        launches |= output_layer_launches(dtype, rank=1024, bias=False) | output_layer_launches(dtype, 129, bias=True)
    launches |= head_rerank_launches(torch.float32, 160, VOCABULARIES[-1])
    # What samples add to the first launch is little; it compiles for seconds.
    heads = head_blend_launches(torch.float32, 160, VOCABULARIES[-1])
    return launches | {name: launch for name, launch in heads.items() if not name.startswith("head project, sampled")}


def output_layer_launches(dtype: torch.dtype, rank: int, bias: bool) -> dict[str, Launch]:
    """Those that compute outputs of a linear layer [V, rank] of this precision for a few tokens of each row."""
    weight = _tensor(_PADDING, rank, dtype=dtype)
    tokens, outputs = _tensor(_ROWS, 10, dtype=torch.int64), _tensor(_ROWS, 10)
    own = _tensor(_PADDING, dtype=dtype) if bias else None
    launch = gather.plan_launch(_tensor(_ROWS, rank), weight, own, tokens, outputs)
    return {f"gather, R = {rank}, {_short(dtype)}{', bias' if bias else ''}": launch}


def head_blend_launches(dtype: torch.dtype, rank: int, vocabulary: int) -> dict[str, Launch]:
    """Those that mix a head [vocabulary, rank] of this precision into a base model's logits [B, vocabulary] float32,
    padded behind each row or not."""
    return {
        name: launch
        for stride, suffix in _strides(vocabulary)
        for name, launch in _head_blend(dtype, rank, vocabulary, stride, suffix)
    }


def head_rerank_launches(dtype: torch.dtype, rank: int, vocabulary: int) -> dict[str, Launch]:
    """Those by which heads of this precision, [vocabulary, a multiple of 16], score candidates of a base model's logits
    [B, vocabulary] float32, padded behind each row or not, and write its rows."""
    return {
        name: launch
        for stride, suffix in _strides(vocabulary)
        for name, launch in _head_rerank(dtype, rank, vocabulary, stride, suffix)
    }


def _head_rerank(
    dtype: torch.dtype, rank: int, vocabulary: int, stride: int, suffix: str
) -> Iterator[tuple[str, Launch]]:
    none = _tensor(0)
    head = HeadWeights(
        *(none, none, none, none), _tensor(vocabulary, rank, dtype=dtype), _tensor(vocabulary, dtype=dtype)
    )
    # A row by itself is split most, and rows that are each a GPU's program least.
    for lines in (1, 264):
        index, numbers = _tensor(lines, dtype=torch.int64), _tensor(lines, 1)
        terms = RewardTerms(numbers, numbers, numbers, _tensor(lines, 1, dtype=torch.int32))
        workspace = head_rerank.make_workspace(lines, vocabulary, _DEVICE)
        logits, features = _tensor(lines, stride)[:, :vocabulary], _tensor(lines, rank)
        for k in (16, 32, 64):
            asked = HeadRows(index, k, None, [head], terms, _tensor(1, 6, dtype=torch.int64))
            ids, each = _tensor(lines, k, dtype=torch.int64), _tensor(lines, k)
            done = HeadReranked(ids, each, each, each, _tensor(lines, 1, k), _tensor(lines, dtype=torch.bool))
            scan, write = head_rerank.plan_launches(logits, features, asked, workspace, done)
            yield f"head scan, k = {k}, {scan.choices['SUMMITS']} summits{suffix}", scan
            yield f"head rerank, k = {k}, {write.choices['MERGED']} parts, {_short(dtype)}{suffix}", write


def _strides(vocabulary: int) -> Iterator[tuple[int, str]]:
    """Distances of a base model's rows, and how launches over them are told apart."""
    yield vocabulary, ""
    padded = triton.cdiv(vocabulary, _PADDING) * _PADDING
    if padded != vocabulary:
        yield padded, ", padded rows"


def _head_blend(
    dtype: torch.dtype, rank: int, vocabulary: int, stride: int, suffix: str
) -> Iterator[tuple[str, Launch]]:
    weight, bias = _tensor(vocabulary, rank, dtype=dtype), _tensor(vocabulary, dtype=dtype)
    for rows in (_ROWS, 64):
        numbers, pairs, integers = _tensor(rows), _tensor(rows, 2), _tensor(rows, dtype=torch.int32)
        asked = BlendRows(integers, numbers, pairs, pairs, _tensor(rows, dtype=torch.int64))
        whole, flags = _tensor(rows, vocabulary), _tensor(rows, dtype=torch.bool)
        out = BlendedRows(numbers, numbers, integers, whole, whole, numbers, numbers, flags)
        workspace = head_blend.make_workspace(rows, vocabulary, _DEVICE)
        logits, features = _tensor(rows, stride)[:, :vocabulary], _tensor(rows, rank)
        for kind, samples, gated in (("direct", 0, False), ("gated", 0, True), ("sampled", 1000, True)):
            project, *sample, settle = head_blend.plan_launches(
                logits, features, weight, bias, asked, workspace, out, samples, gated
            )
            yield f"head project, {kind}, B = {rows}, R = {rank}{suffix}", project
            yield f"head settle, {kind}{suffix}", settle
            yield from ((f"head sample{suffix}", launch) for launch in sample)


def sampling_launches(vocabulary: int) -> dict[str, Launch]:
    """Those of the sampling step over a base model's logits [B, vocabulary] float32, padded behind each row or not."""
    return {
        f"{name}{suffix}": launch
        for stride, suffix in _strides(vocabulary)
        for name, launch in _sampling(vocabulary, stride)
    }


def distinct_launches(launches: Mapping[str, Launch]) -> dict[str, Launch]:
    """The first launch of each variant: what there is to compile."""
    first = {launch.variant: name for name, launch in reversed(list(launches.items()))}
    return {name: launch for name, launch in launches.items() if first[launch.variant] == name}


def _sampling(vocabulary: int, stride: int) -> Iterator[tuple[str, Launch]]:
    logits = _tensor(_ROWS, stride)[:, :vocabulary]
    yield from _topk(logits)
    yield from _rerank(logits)
    yield from _blend(logits)


def _topk(logits: torch.Tensor) -> Iterator[tuple[str, Launch]]:
    vocabulary = logits.shape[1]
    workspace = topk.make_workspace(_ROWS, vocabulary, _DEVICE)
    for k in (8, 16, 32, 64):
        out = (_tensor(_ROWS, k, dtype=torch.int32), _tensor(_ROWS, k), _tensor(_ROWS))
        scan, finish = topk.plan_launches(logits, k, workspace, *out)
        yield "topk scan", scan
        yield f"topk finish, V = {vocabulary}, k = {k}", finish


def _rerank(logits: torch.Tensor) -> Iterator[tuple[str, Launch]]:
    rows, terms = _tensor(_ROWS, dtype=torch.int64), _tensor(_ROWS, 2)
    asked = RewardTerms(terms, terms, terms, _tensor(_ROWS, 2, dtype=torch.int32))
    for k in (16, 32, 64):
        ids, candidates = _tensor(_ROWS, k, dtype=torch.int64), _tensor(_ROWS, k)
        rewards = _tensor(_ROWS, 2, k)
        yield f"rerank, k = {k}", rerank.plan_launch(logits, rows, ids, candidates, asked, rewards, candidates)


def _blend(base: torch.Tensor) -> Iterator[tuple[str, Launch]]:
    numbers, pairs, integers = _tensor(_ROWS), _tensor(_ROWS, 2), _tensor(_ROWS, dtype=torch.int32)
    workspace = blend.make_workspace(_ROWS, base.shape[1], _DEVICE)
    # Policies' logits are float32 in memory of their own, whatever the model's precision.
    policy, seeds = _tensor(_ROWS, base.shape[1]), _tensor(_ROWS, dtype=torch.int64)
    asked, out = BlendRows(integers, numbers, pairs, pairs, seeds), Blended(numbers, numbers, integers)
    for samples in (0, 1000):
        stream, *sample, write = blend.plan_launches(base, policy, asked, workspace, out, samples)
        suffix = "sampled" if samples else "exact"
        yield f"blend stream, {suffix}", stream
        yield f"blend write, {suffix}", write
        yield from (("blend sample", launch) for launch in sample)


def attention_launches(
    dtype: torch.dtype, width: int, heads: int, shared: int, longest: int = 2**20
) -> dict[str, Launch]:
    """Those of a step of an auxiliary model whose layers have `heads` key-value heads of `width` channels, each for
    `shared` query heads, over prefixes of up to `longest` tokens."""
    launches: dict[str, Launch] = {}
    suffix = f"d = {width}, {_short(dtype)}"
    for k, branches in ((1, 0), (10, 1), (64, 2)):
        for splits, parts in ((1, ""), (2, ", split")):
            attend, *_ = _attend(dtype, width, heads, shared, k, branches, splits)
            launches[f"attention, T = {1 + k * branches}, {suffix}{parts}"] = attend
    # The number of splits follows the rows and the block table's width, which in a graph is that of the model's window.
    most = max(2, attention.choose_splits(1, heads, longest))
    for splits in (1 << n for n in range(most.bit_length())):
        _, *merge = _attend(dtype, width, heads, shared, 10, 1, splits)
        launches |= {f"attention merge of {splits}, {suffix}": launch for launch in merge}
    return launches


def _attend(
    dtype: torch.dtype, width: int, heads: int, shared: int, k: int, branches: int, splits: int
) -> list[Launch]:
    rows, fed, blocks = 4, 1 + k * branches, 8
    # As the decoder makes them: heads of one joined projection.
    fresh = _tensor(rows, fed, heads * (shared + 2), width, dtype=dtype).transpose(1, 2)
    query, key, value = fresh.split([heads * shared, heads, heads], dim=1)
    cache = _tensor(heads, 1024, 16, width, dtype=dtype)
    return attention.plan_launches(
        query, key, value, cache, cache, _tensor(rows, blocks, dtype=torch.int64),
        _tensor(rows, dtype=torch.int32), _tensor(rows, fed, heads * shared, width, dtype=dtype),
        _tensor(rows, heads * shared, fed, splits, width + 2), k=k, scale=width**-0.5, window=None, exact=False,
    )  # fmt: skip


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=_DEVICE)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
