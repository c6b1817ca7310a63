"""The attention function that auxiliary models are given: a paged prefix, the tokens fed, and candidate branches.

transformers hands every layer's query, key and value to a registered function. Ours writes the keys and values of
committed tokens to the paged cache and lets every token fed see its prefix there. Candidates are never written:
each sees the prefix and, beside it, only the tokens of its own branch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from steersman.guidance.cache import BLOCK_SIZE, LayerShape, PagedCache

ATTENTION_NAME = "steersman"


@dataclass
class AttentionBatch:
    """What one forward attends to. G rows of T tokens each; L = blocks a row · BLOCK_SIZE cached columns."""

    cache: PagedCache
    tables: torch.Tensor
    """[G, L / BLOCK_SIZE] block indices, int64; rows are padded with any valid block."""
    positions: torch.Tensor
    """[G, T] absolute position of each token fed."""
    visible: torch.Tensor
    """[G, T] number of cached columns that a token may see (its own included when it is written)."""
    written: tuple[torch.Tensor, torch.Tensor]
    """(row, column) indices of the tokens fed whose keys and values go to the cache."""
    destinations: tuple[torch.Tensor, torch.Tensor]
    """(block, offset) for each written token."""
    branch: torch.Tensor | None
    """[T, E] for each token the columns fed that it sees beside the cache, -1 for none; None if none sees any."""
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """Additive float32 mask [1, G, 1, T, L] for a sliding window of `window` tokens, or none."""
        if window not in self.masks:
            columns = torch.arange(self.tables.shape[1] * BLOCK_SIZE, device=self.tables.device)
            allowed = columns < self.visible.unsqueeze(-1)
            if window is not None:
                allowed &= columns > self.positions.unsqueeze(-1) - window
            mask = torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, -torch.inf)
            self.masks[window] = mask[None, :, None]
        return self.masks[window]


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
    key, value = key.transpose(0, 1), value.transpose(0, 1)  # [H, G, T, d]
    all_keys, all_values = batch.cache.keys[layer], batch.cache.values[layer]
    block, offset = batch.destinations
    row, column = batch.written
    all_keys[:, block, offset] = key[:, row, column]
    all_values[:, block, offset] = value[:, row, column]

    columns = batch.tables.shape[1] * BLOCK_SIZE
    table = batch.tables.reshape(-1)
    prefix_keys = all_keys.index_select(1, table).view(heads * rows, columns, width)
    prefix_values = all_values.index_select(1, table).view(heads * rows, columns, -1)

    # Query heads that share a key head are folded into the token axis: nothing is repeated.
    groups = query_heads // heads
    folded = (query * scale).view(rows, heads, groups, fed, width).transpose(0, 1)  # [H, G, groups, T, d]
    scores = torch.bmm(folded.reshape(heads * rows, groups * fed, width), prefix_keys.transpose(1, 2))
    scores = _cap(scores.float(), softcap).view(heads, rows, groups, fed, columns) + batch.mask(window)

    own_values = None
    if batch.branch is not None:
        own_scores, own_values = _branch_scores(batch.branch, folded, key, value)
        scores = torch.cat((scores, _cap(own_scores, softcap)), dim=-1)
    if sinks is not None:
        sink = sinks.float().view(heads, 1, groups, 1, 1).expand(heads, rows, groups, fed, 1)
        scores = torch.cat((scores, sink), dim=-1)

    weights = scores.softmax(dim=-1).to(value.dtype)
    prefix_weights = weights[..., :columns].reshape(heads * rows, groups * fed, columns)
    out = torch.bmm(prefix_weights, prefix_values).view(heads, rows, groups, fed, -1)
    if own_values is not None:
        own_weights = weights[..., columns : columns + own_values.shape[-2]]
        out = out + (own_weights.unsqueeze(-1) * own_values.unsqueeze(2)).sum(dim=-2)
    return out.permute(1, 3, 0, 2, 4).reshape(rows, fed, query_heads, -1)


def _branch_scores(
    branch: torch.Tensor, folded: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [H, G, groups, T, E] of each token against its branch and the branch's values [H, G, T, E, dv]."""
    index = branch.clamp(min=0)
    own_keys, own_values = key[:, :, index], value[:, :, index]  # [H, G, T, E, d]
    scores = (folded.unsqueeze(-2) * own_keys.unsqueeze(2)).sum(dim=-1).float()
    return scores.masked_fill(branch < 0, -torch.inf), own_values


def _cap(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


# A name unknown to AttentionMaskInterface makes transformers build no mask of its own.
AttentionInterface.register(ATTENTION_NAME, attend)
