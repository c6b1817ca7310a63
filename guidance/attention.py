"""The attention function that auxiliary models are given: a paged prefix, the tokens fed, and candidate branches.

transformers hands every layer's query, key and value to a registered function. Ours writes them to the paged cache:
committed tokens to their place, candidates to scratch blocks that the next step overwrites. One gather then brings a
row's prefix and candidates together, and a mask lets each candidate see the prefix and its own branch only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from steersman.guidance.cache import BLOCK_SIZE, LayerShape, PagedCache

ATTENTION_NAME = "steersman"


@dataclass
class AttentionBatch:
    """What one forward attends to. G rows of T tokens each; L = gathered blocks a row · BLOCK_SIZE columns, of which
    the last `branches.shape[1]` (none without branches) are scratch."""

    cache: PagedCache
    tables: torch.Tensor
    """[G, L / BLOCK_SIZE] block indices, int64."""
    positions: torch.Tensor
    """[G, T] absolute position of each token fed."""
    visible: torch.Tensor
    """[G, T] number of leading columns that a token may see, its own included."""
    written: tuple[torch.Tensor, torch.Tensor] | None
    """(row, column) indices of the tokens fed that are written; None for all of them."""
    destinations: tuple[torch.Tensor, torch.Tensor]
    """(block, offset) of each written token, of the shape of `written` or [G, T]."""
    branches: torch.Tensor | None = None
    """[T, scratch columns] bool: which scratch columns each token sees."""
    masks: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, groups: int, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask [G, 1, groups · T, L] for a sliding window of `window` tokens, or none."""
        key = (window, groups)
        if key not in self.masks:
            scratch = 0 if self.branches is None else self.branches.shape[1]
            columns = torch.arange(self.tables.shape[1] * BLOCK_SIZE - scratch, device=self.tables.device)
            allowed = columns < self.visible.unsqueeze(-1)
            if window is not None:
                allowed &= columns > self.positions.unsqueeze(-1) - window
            if self.branches is not None:
                allowed = torch.cat((allowed, self.branches.expand(len(allowed), -1, -1)), dim=-1)
            mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)
            self.masks[key] = mask.repeat(1, groups, 1).unsqueeze(1)
        return self.masks[key]


@dataclass
class ShapeProbe:
    """Stands in for a batch while a model is probed: records each layer's shape and attends causally."""

    layers: dict[int, LayerShape] = field(default_factory=dict)
    calls: int = 0


_current: AttentionBatch | ShapeProbe | None = None


@contextmanager
def attending(batch: AttentionBatch | ShapeProbe) -> Iterator[None]:
    """Makes `batch` the one that the attention function serves. Models drop unknown keyword arguments on the way
    to their layers, so the batch travels beside the call."""
    global _current
    _current = batch
    try:
        yield
    finally:
        _current = None


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [G, HQ, T, d], key [G, H, T, d], value [G, H, T, dv] → ([G, T, HQ, dv], None)."""
    if _current is None:
        raise RuntimeError("the model was called outside of steersman's runtime")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx
    if isinstance(_current, ShapeProbe):
        _current.calls += 1
        _current.layers[layer] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1])
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
    return _attend_paged(_current, layer, query, key, value, scale, sliding_window, softcap, s_aux), None


def _attend_paged(
    batch: AttentionBatch,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    rows, query_heads, fed, width = query.shape
    heads = key.shape[1]
    all_keys, all_values = batch.cache.keys[layer], batch.cache.values[layer]
    block, offset = batch.destinations
    if batch.written is None:
        all_keys[:, block, offset] = key.transpose(0, 1)
        all_values[:, block, offset] = value.transpose(0, 1)
    else:
        row, column = batch.written
        all_keys[:, block, offset] = key.transpose(0, 1)[:, row, column]
        all_values[:, block, offset] = value.transpose(0, 1)[:, row, column]

    columns = batch.tables.shape[1] * BLOCK_SIZE
    table = batch.tables.reshape(-1)
    keys = all_keys.index_select(1, table).view(heads, rows, columns, width).transpose(0, 1)
    values = all_values.index_select(1, table).view(heads, rows, columns, -1).transpose(0, 1)

    # Query heads that share a key head are folded into the token axis: nothing is repeated.
    groups = query_heads // heads
    folded = query.reshape(rows, heads, groups * fed, width)
    mask = batch.mask(window, groups, query.dtype)
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    else:
        out = _attend_explicitly(folded, keys, values, mask, scale, softcap, sinks)
    return out.view(rows, query_heads, fed, -1).transpose(1, 2)


def _attend_explicitly(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax attention with what the fused function lacks: capped scores (Gemma 2) and attention sinks (gpt-oss)."""
    scores = (query @ keys.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask
    if sinks is not None:
        rows, heads, folded, _ = scores.shape
        groups = len(sinks) // heads
        sink = sinks.float().view(1, heads, groups, 1).expand(rows, -1, -1, folded // groups)
        scores = torch.cat((scores, sink.reshape(rows, heads, folded, 1)), dim=-1)
    weights = scores.softmax(dim=-1)[..., : keys.shape[-2]]
    return weights.to(values.dtype) @ values


# A name unknown to AttentionMaskInterface makes transformers build no mask of its own.
AttentionInterface.register(ATTENTION_NAME, attend)
