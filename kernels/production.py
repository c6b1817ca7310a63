"""Every launch that a server makes: what is compiled and checked without a GPU, and warmed up with one.

A launch's variants come from data types, bucketed sizes and whether a row's length is a multiple of 16; numbers that
change from step to step make none.
"""

from collections.abc import Iterator

import torch

from steersman.kernels import attention, blend, rerank, topk
from steersman.kernels.arguments import Blended, BlendRows, RewardTerms
from steersman.kernels.launch import Launch

VOCABULARIES = (32_000, 128_256)
"""One of each bucket of sizes: up to 65,536 entries, and up to 262,144."""
_ROWS = 8
_DEVICE = torch.device("meta")


def production_launches() -> dict[str, Launch]:
    """Name → launch, over tensors without memory."""
    return dict([*_topk(), *_rerank(), *_blend(), *_attention()])


def _topk() -> Iterator[tuple[str, Launch]]:
    for vocabulary in VOCABULARIES:
        logits = _tensor(_ROWS, vocabulary)
        workspace = topk.make_workspace(_ROWS, vocabulary, _DEVICE)
        for k in (8, 16, 32, 64):
            out = (_tensor(_ROWS, k, dtype=torch.int32), _tensor(_ROWS, k), _tensor(_ROWS))
            scan, finish = topk.plan_launches(logits, k, workspace, *out)
            yield "topk scan", scan
            yield f"topk finish, V = {vocabulary}, k = {k}", finish


def _rerank() -> Iterator[tuple[str, Launch]]:
    logits, rows = _tensor(_ROWS, VOCABULARIES[1]), _tensor(_ROWS, dtype=torch.int32)
    for k in (16, 64):
        ids, candidates = _tensor(_ROWS, k, dtype=torch.int32), _tensor(_ROWS, k)
        for count in (1, 2, 3):
            numbers = _tensor(_ROWS, count)
            terms = RewardTerms(numbers, numbers, numbers, _tensor(_ROWS, count, dtype=torch.int32))
            given = (logits, rows, ids, candidates, terms, _tensor(_ROWS, count, k), candidates)
            yield f"rerank, k = {k}, rewards = {count}", rerank.plan_launch(*given, None, None, None)
            for dtype in (torch.bfloat16, torch.float32):
                hidden, heads = _tensor(_ROWS, k, 896, dtype=dtype), _tensor(count, 896, dtype=dtype)
                name = f"rerank, k = {k}, heads = {count}, {_short(dtype)}"
                yield name, rerank.plan_launch(*given, hidden, heads, _tensor(count))


def _blend() -> Iterator[tuple[str, Launch]]:
    numbers = _tensor(_ROWS)
    for vocabulary in VOCABULARIES:
        base = _tensor(_ROWS, vocabulary)
        workspace = blend.make_workspace(_ROWS, vocabulary, _DEVICE)
        for dtype in (torch.bfloat16, torch.float32):
            policy = _tensor(_ROWS, vocabulary, dtype=dtype)
            integers, seeds = _tensor(_ROWS, dtype=torch.int32), _tensor(_ROWS, dtype=torch.int64)
            pairs = _tensor(_ROWS, 2)
            asked, out = BlendRows(integers, numbers, pairs, pairs, seeds), Blended(numbers, numbers, integers)
            for samples in (0, 1000):
                launches = blend.plan_launches(base, policy, asked, workspace, out, samples)
                suffix = f"{_short(dtype)}, {'sampled' if samples else 'exact'}"
                yield f"blend stream, {suffix}", launches[0]
                yield f"blend write, {suffix}", launches[-1]
                if samples:
                    yield f"blend sample, {_short(dtype)}", launches[1]


def _attention() -> Iterator[tuple[str, Launch]]:
    for dtype in (torch.bfloat16, torch.float32):
        for width in (64, 128):
            for k, branches in ((1, 0), (10, 1), (64, 2)):
                for columns in (128, 2048):
                    launches = _attend(dtype, width, k, branches, columns)
                    split = ", split" if columns > 128 else ""
                    yield f"attention, d = {width}, T = {1 + k * branches}, {_short(dtype)}{split}", launches[0]
                    if launches[1:]:
                        yield f"attention merge of {_splits(launches[1])}, d = {width}, {_short(dtype)}", launches[1]
            # In a graph tables are as wide as the model's window, whatever the batch: any number of splits may come.
            for splits in (2, 4, 8, 16, 32, 64, 128):
                merge = _attend(dtype, width, 10, 1, 2048, splits)[1]
                yield f"attention merge of {splits}, d = {width}, {_short(dtype)}", merge


def _splits(launch: Launch) -> int:
    return int(launch.choices["SPLITS"])


def _attend(
    dtype: torch.dtype, width: int, k: int, branches: int, columns: int, splits: int | None = None
) -> list[Launch]:
    rows, heads, shared, fed = 4, 4, 7, 1 + k * branches
    # As the decoder makes them: heads of one joined projection.
    fresh = _tensor(rows, fed, heads * (shared + 2), width, dtype=dtype).transpose(1, 2)
    query, key, value = fresh.split([heads * shared, heads, heads], dim=1)
    cache = _tensor(heads, 1024, 16, width, dtype=dtype)
    splits = splits or attention.choose_splits(rows, heads, columns)
    return attention.plan_launches(
        query, key, value, cache, cache, _tensor(rows, columns // 16, dtype=torch.int64),
        _tensor(rows, dtype=torch.int32), _tensor(rows, fed, heads * shared, width, dtype=dtype),
        _tensor(rows, heads * shared, fed, splits, width + 2), k=k, scale=width**-0.5, window=None, exact=False,
    )  # fmt: skip


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=_DEVICE)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
