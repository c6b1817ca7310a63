"""The attention function that auxiliary models are given: a paged prefix, the tokens fed, and candidate branches.

transformers hands every layer's query, key and value to a registered function. Ours writes them to the paged cache:
committed tokens to their place, candidates to scratch blocks that the next step overwrites. One gather then brings a
row's prefix and candidates together, and a mask lets each candidate see the prefix and its own branch only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from steersman.guidance.cache import BLOCK_SIZE, LayerShape, PagedCache
from steersman.kernels.dispatch import attend_candidates

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
    """[T, scratch columns]: 0 where a token sees a scratch column, -inf where it does not."""
    masks: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)

    @cached_property
    def slots(self) -> torch.Tensor:
        """Flat indices of the written tokens' places in a layer's cache."""
        block, offset = self.destinations
        return (block * BLOCK_SIZE + offset).reshape(-1)

    def mask(self, window: int | None, groups: int, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask [G, 1, groups · T, L] for a sliding window of `window` tokens, or none."""
        key = (window, groups)
        if key not in self.masks:
            scratch = 0 if self.branches is None else self.branches.shape[1]
            columns = torch.arange(self.tables.shape[1] * BLOCK_SIZE - scratch, device=self.tables.device)
            allowed = columns < self.visible.unsqueeze(-1)
            if window is not None:
                allowed &= columns > self.positions.unsqueeze(-1) - window
            mask = torch.where(allowed, 0.0, -torch.inf).to(dtype)
            if self.branches is not None:
                mask = torch.cat((mask, self.branches.to(dtype).expand(len(mask), -1, -1)), dim=-1)
            self.masks[key] = (mask if groups == 1 else mask.repeat(1, groups, 1)).unsqueeze(1)
        return self.masks[key]


@dataclass(frozen=True)
class CandidateBatch:
    """A step of [last token | branches] that the Triton kernel attends to; G rows of T tokens each."""

    cache: PagedCache
    tables: torch.Tensor
    """[G, W] block indices, int64."""
    lengths: torch.Tensor
    """[G] int32: tokens cached before the last one."""
    positions: torch.Tensor
    """[G, T] absolute position of each token fed."""
    k: int
    """Candidates; 0 where the last token is alone."""


@dataclass(frozen=True)
class AttentionSettings:
    """How one layer attends."""

    scale: float
    window: int | None = None
    """Tokens that a token sees, itself included; None for all."""
    softcap: float | None = None
    """Scores are capped at (Gemma 2)."""
    sinks: torch.Tensor | None = None
    """[HQ] scores that belong to no token (gpt-oss)."""

    @property
    def is_plain(self) -> bool:
        """Whether the fused attention function can do it."""
        return self.softcap is None and self.sinks is None


@dataclass
class ShapeProbe:
    """Stands in for a batch while a model is probed: records each layer's shape and settings."""

    layers: dict[int, LayerShape] = field(default_factory=dict)
    settings: dict[int, AttentionSettings] = field(default_factory=dict)
    calls: int = 0


_current: ContextVar[AttentionBatch | CandidateBatch | ShapeProbe | None] = ContextVar("attended", default=None)
"""A thread's own: a model may be loaded in one while another steps."""


@contextmanager
def attending(batch: AttentionBatch | CandidateBatch | ShapeProbe) -> Iterator[None]:
    """Makes `batch` the one that the attention function serves. Models drop unknown keyword arguments on the way
    to their layers, so the batch travels beside the call."""
    token = _current.set(batch)
    try:
        yield
    finally:
        _current.reset(token)


class _AttentionLayer(Protocol):
    """What transformers passes as the calling module."""

    layer_idx: int


def attend(
    module: _AttentionLayer,
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
    batch = _current.get()
    if batch is None:
        raise RuntimeError("the model was called outside of steersman's runtime")
    settings = AttentionSettings(
        query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux
    )
    layer = module.layer_idx
    if isinstance(batch, ShapeProbe):
        batch.calls += 1
        batch.layers[layer] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1])
        batch.settings[layer] = settings
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
    return attend_paged(batch, layer, query, key, value, settings), None


def attend_paged(
    batch: AttentionBatch | CandidateBatch,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    settings: AttentionSettings,
) -> torch.Tensor:
    """Writes keys and values to the cache and attends: shapes as `attend`'s → [G, T, HQ, dv]."""
    if isinstance(batch, CandidateBatch):
        cache = batch.cache.keys[layer], batch.cache.values[layer]
        tables, scale, window = batch.tables, settings.scale, settings.window
        return attend_candidates(query, key, value, cache, tables, batch.lengths, batch.k, scale, window)
    rows, query_heads, fed, width = query.shape
    heads = key.shape[1]
    all_keys, all_values = batch.cache.keys[layer], batch.cache.values[layer]
    _write(all_keys, key, batch)
    _write(all_values, value, batch)
    columns = batch.tables.shape[1] * BLOCK_SIZE
    table = batch.tables.reshape(-1)
    keys = all_keys.index_select(1, table).view(heads, rows, columns, width).transpose(0, 1)
    values = all_values.index_select(1, table).view(heads, rows, columns, -1).transpose(0, 1)

    # Query heads that share a key head are folded into the token axis: nothing is repeated.
    groups = query_heads // heads
    folded = query.reshape(rows, heads, groups * fed, width)
    mask = batch.mask(settings.window, groups, query.dtype)
    if settings.is_plain:
        out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=settings.scale)
    else:
        out = _attend_explicitly(folded, keys, values, mask, settings)
    return out.view(rows, query_heads, fed, -1).transpose(1, 2)


def _write(cached: torch.Tensor, tokens: torch.Tensor, batch: AttentionBatch) -> None:
    """Puts tokens [G, H, T, d] into their slots of a layer's cache [H, blocks, BLOCK_SIZE, d]."""
    heads, width = cached.shape[0], cached.shape[-1]
    new = tokens.transpose(0, 1)
    if batch.written is not None:
        row, column = batch.written
        new = new[:, row, column]
    cached.view(heads, -1, width).index_copy_(1, batch.slots, new.reshape(heads, -1, width))


def _attend_explicitly(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, settings: AttentionSettings
) -> torch.Tensor:
    """Softmax attention with what the fused function lacks: capped scores and attention sinks."""
    softcap, sinks = settings.softcap, settings.sinks
    scores = (query @ keys.transpose(-1, -2)).float() * settings.scale
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
