"""One decoding step of an auxiliary model's layer over the paged cache, for all candidates at once.

Each row feeds [last token | branches]: k candidates, or k candidates and one more token behind each. The prefix is read
once for all of them; a branch sees the prefix, the last token and itself. Only the last token's key and value enter
the cache, so that nothing has to be moved once a candidate is chosen: it is the next step's last token.
"""

import torch
import triton
import triton.language as tl

from steersman.kernels.launch import Launch, is_small, require_contiguous, require_rows

_PROGRAMS = 264
_NO_WINDOW = 2**30
_LEAST_COLUMNS = 256
"""A split with fewer columns of the prefix costs more to merge than it saves."""


def candidate_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache_keys: torch.Tensor,
    cache_values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    scale: float,
    window: int | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """query: [B, HQ, T, d]; key, value: [B, H, T, d], any strides with contiguous d; T = 1 or 1 + k or 1 + 2 k.
    cache_keys, cache_values: [H, blocks, block size, d], written in place at position `lengths` of every row.
    tables: [B, W] int64 blocks of each row. lengths: [B] int32 tokens cached before the last one; below 0 for a row
    that only fills up the batch: it sees itself and writes nothing. window: tokens that a token sees, itself included.
    exact: multiply in float32 whatever the dtype.

    Returns [B, T, HQ, d] in the query's dtype.
    """
    rows, heads, fed, width = query.shape
    out = torch.empty(rows, fed, heads, width, dtype=query.dtype, device=query.device)
    if rows:
        splits = choose_splits(rows, key.shape[1], tables.shape[1] * cache_keys.shape[2])
        partial = torch.empty(rows, heads, fed, splits, width + 2, dtype=torch.float32, device=query.device)
        arguments = (query, key, value, cache_keys, cache_values, tables, lengths, out, partial)
        for launch in plan_launches(*arguments, k=k, scale=scale, window=window, exact=exact):
            launch.run()
    return out


def choose_splits(rows: int, heads: int, columns: int) -> int:
    """Into how many parts the longest prefix is cut, for the whole GPU to have work; a power of two."""
    wanted = min(_PROGRAMS // max(1, rows * heads), columns // _LEAST_COLUMNS)
    return 1 if wanted < 2 else 1 << (wanted.bit_length() - 1)


def plan_launches(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache_keys: torch.Tensor,
    cache_values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    partial: torch.Tensor,
    *,
    k: int,
    scale: float,
    window: int | None,
    exact: bool,
) -> list[Launch]:
    """The launch, and the one that merges where the prefix is split."""
    require_rows(query=query, key=key, value=value, tables=tables)
    require_contiguous(cache_keys=cache_keys, cache_values=cache_values, lengths=lengths)
    rows, query_heads, fed, width = query.shape
    heads, splits = key.shape[1], partial.shape[3]
    shared = query_heads // heads
    padded = max(16, triton.next_power_of_2(width))
    # Float32 has no registers left for the division and goes through the merge.
    merged = splits > 1 or query.dtype == torch.float32
    # What fits into the registers of four warps.
    roomy = query.dtype.itemsize == 2 or padded <= 64
    queries = 16 if fed * shared <= 16 else 64 if roomy else 32
    small = is_small()
    # A product sums over at least 16 columns.
    columns = max(16, (64 if query.dtype.itemsize == 2 else 32 if roomy else 16) // (2 if small else 1))
    fresh = 32 if fed > 16 and roomy and not small else 16
    attend = Launch(
        _attend,
        (rows, heads * triton.cdiv(fed * shared, queries), splits),
        dict(
            query=query, query_row=query.stride(0), query_head=query.stride(1), query_token=query.stride(2),
            key=key, key_row=key.stride(0), key_head=key.stride(1), key_token=key.stride(2),
            value=value, value_row=value.stride(0), value_head=value.stride(1), value_token=value.stride(2),
            cache_keys=cache_keys, cache_values=cache_values, blocks=cache_keys.shape[1],
            tables=tables, table_row=tables.stride(0), lengths=lengths, out=out, partial=partial,
            heads=heads, shared=shared, fed=fed, branches=max(k, 1), splits=splits, scale=scale,
            window=_NO_WINDOW if window is None else window,
        ),
        dict(
            WIDTH=width, PADDED=padded, QUERIES=queries, COLUMNS=columns, FRESH=fresh,
            BLOCK=cache_keys.shape[2], SPLIT=merged, EXACT=exact or query.dtype == torch.float32,
        ),
        warps=4,
        stages=2,
    )  # fmt: skip
    if not merged:
        return [attend]
    merge = Launch(
        _merge,
        (rows * fed, query_heads),
        dict(partial=partial, out=out, fed=fed, query_heads=query_heads),
        dict(WIDTH=width, PADDED=padded, SPLITS=splits),
        # 64 partial sums a thread: more do not fit into its registers.
        warps=max(1, splits * padded // 2048),
    )
    return [attend, merge]


@triton.jit
def _dot(left, right, EXACT: tl.constexpr):
    if EXACT:
        # Three products of tensor cores in place of one, for nearly the precision of float32.
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="tf32x3")
    else:
        return tl.dot(left, right)


@triton.jit
def _accumulate(scores, values, top, total, sums, EXACT: tl.constexpr):
    """Online softmax over another block of columns: scores [M, N] with -inf where unseen, values [N, d]."""
    highest = tl.maximum(top, tl.max(scores, axis=1))
    # A query that has seen nothing yet has no maximum to subtract.
    safe = tl.where(highest == -float("inf"), 0.0, highest)
    weights = tl.exp(scores - safe[:, None])
    kept = tl.exp(top - safe)
    total = total * kept + tl.sum(weights, axis=1)
    sums = sums * kept[:, None] + _dot(weights.to(values.dtype), values, EXACT)
    return highest, total, sums


@triton.jit(do_not_specialize=["blocks", "table_row", "heads", "shared", "fed", "branches", "splits", "window"])
def _attend(
    query, query_row, query_head, query_token, key, key_row, key_head, key_token,
    value, value_row, value_head, value_token, cache_keys, cache_values, blocks, tables, table_row, lengths,
    out, partial, heads, shared, fed, branches, splits, scale, window,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr, COLUMNS: tl.constexpr,
    FRESH: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head, part = tl.program_id(1) % heads, tl.program_id(1) // heads
    # Counted in blocks: a layer's cache may hold more than 2³¹ numbers.
    first_block = head * blocks
    cached = tl.load(lengths + row)
    length = tl.maximum(cached, 0)
    asked = part * QUERIES + tl.arange(0, QUERIES)
    token, sharer = asked // shared, asked % shared
    real = token < fed
    position = length + tl.where(token == 0, 0, 1 + (token - 1) // branches)
    channel = tl.arange(0, PADDED)
    wide = channel < WIDTH
    queries = tl.load(
        query + row * query_row + (head * shared + sharer)[:, None] * query_head + token[:, None] * query_token
        + channel[None, :], mask=real[:, None] & wide[None, :], other=0.0,
    )  # fmt: skip
    top = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, PADDED], tl.float32)

    first = tl.maximum(length - window + 1, 0) // COLUMNS * COLUMNS
    each = tl.cdiv(tl.cdiv(length - first, COLUMNS), splits) * COLUMNS
    begin = first + split * each
    end = tl.minimum(begin + each, length)
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < end
        block = tl.load(tables + row * table_row + column // BLOCK, mask=inside, other=0).to(tl.int64)
        slot = ((first_block + block) * BLOCK + column % BLOCK) * WIDTH
        keys = tl.load(cache_keys + slot[None, :] + channel[:, None], mask=wide[:, None] & inside[None, :], other=0.0)
        values = tl.load(
            cache_values + slot[:, None] + channel[None, :], mask=inside[:, None] & wide[None, :], other=0.0
        )
        scores = _dot(queries, keys, EXACT) * scale
        seen = inside[None, :] & (column[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, -float("inf"))
        top, total, sums = _accumulate(scores, values, top, total, sums, EXACT)

    if split == 0:
        for start in range(0, fed, FRESH):
            fresh = start + tl.arange(0, FRESH)
            there = fresh < fed
            keys = tl.load(
                key + row * key_row + head * key_head + fresh[None, :] * key_token + channel[:, None],
                mask=wide[:, None] & there[None, :], other=0.0,
            )  # fmt: skip
            values = tl.load(
                value + row * value_row + head * value_head + fresh[:, None] * value_token + channel[None, :],
                mask=there[:, None] & wide[None, :], other=0.0,
            )  # fmt: skip
            scores = _dot(queries, keys, EXACT) * scale
            behind = length + tl.where(fresh == 0, 0, 1 + (fresh - 1) // branches)
            own = ((fresh - 1) % branches)[None, :] == ((token - 1) % branches)[:, None]
            seen = (fresh == 0)[None, :] | (own & (fresh > 0)[None, :] & (fresh[None, :] <= token[:, None]))
            seen = seen & there[None, :] & (behind[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, -float("inf"))
            top, total, sums = _accumulate(scores, values, top, total, sums, EXACT)
        if (part == 0) & (cached >= 0):
            block = tl.load(tables + row * table_row + length // BLOCK).to(tl.int64)
            slot = ((first_block + block) * BLOCK + length % BLOCK) * WIDTH
            last_key = tl.load(key + row * key_row + head * key_head + channel, mask=wide)
            last_value = tl.load(value + row * value_row + head * value_head + channel, mask=wide)
            tl.store(cache_keys + slot + channel, last_key, mask=wide)
            tl.store(cache_values + slot + channel, last_value, mask=wide)

    place = head * shared + sharer
    if not SPLIT:
        target = out + ((row * fed + token) * (heads * shared) + place)[:, None] * WIDTH + channel[None, :]
        tl.store(target, (sums / total[:, None]).to(out.dtype.element_ty), mask=real[:, None] & wide[None, :])
    else:
        target = partial + (((row * heads * shared + place) * fed + token) * splits + split) * (WIDTH + 2)
        tl.store(target[:, None] + channel[None, :], sums, mask=real[:, None] & wide[None, :])
        tl.store(target + WIDTH, top, mask=real)
        tl.store(target + WIDTH + 1, total, mask=real)


@triton.jit(do_not_specialize=["fed", "query_heads"])
def _merge(
    partial, out, fed, query_heads,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    place, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, token = place // fed, place % fed
    channel, split = tl.arange(0, PADDED), tl.arange(0, SPLITS)
    wide = channel < WIDTH
    parts = partial + (((row * query_heads + head) * fed + token) * SPLITS + split) * (WIDTH + 2)
    tops, totals = tl.load(parts + WIDTH), tl.load(parts + WIDTH + 1)
    scale = tl.exp(tops - tl.max(tops, axis=0))
    sums = tl.load(parts[:, None] + channel[None, :], mask=wide[None, :], other=0.0)
    result = tl.sum(sums * scale[:, None], axis=0) / tl.sum(totals * scale, axis=0)
    tl.store(out + (place * query_heads + head) * WIDTH + channel, result.to(out.dtype.element_ty), mask=wide)
