"""Batched sampling from a language model at temperature 1, with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

from steersman.training.world.progress import track

MAX_NEW_TOKENS = 160

Guide = Callable[[Tensor, Tensor], Tensor]
"""From hidden states [B, D], as the output layer takes them, and logits [B, V]: the logits to sample from."""


@torch.inference_mode()
def sample(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    seed: int,
    description: str,
    batch: int = 256,
    guide: Guide | None = None,
) -> list[list[int]]:
    """One response a prompt, as token ids: ends with `<eos>` unless cut at MAX_NEW_TOKENS."""
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer(list(prompts))["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    responses: list[list[int]] = [[] for _ in ids]
    for start in track(range(0, len(order), batch), description):
        rows = order[start : start + batch]
        for row, response in zip(rows, _sample_batch(model, [ids[i] for i in rows], generator, guide), strict=True):
            responses[row] = response
    return responses


def _sample_batch(
    model: LlamaForCausalLM, prompts: list[list[int]], generator: torch.Generator, guide: Guide | None
) -> list[list[int]]:
    """Finished rows leave the batch and the cache, so the last long responses cost little."""
    eos = model.config.eos_token_id
    ids, mask, positions = _left_padded(prompts)
    cache = DynamicCache(config=model.config)
    responses: list[list[int]] = [[] for _ in prompts]
    alive = torch.arange(len(prompts))
    for _ in range(MAX_NEW_TOKENS):
        hidden = model.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache
        ).last_hidden_state[:, -1]
        logits = model.lm_head(hidden)
        if guide is not None:
            logits = guide(hidden, logits)
        tokens = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)  # [B, 1]
        for row, token in zip(alive.tolist(), tokens[:, 0].tolist(), strict=True):
            responses[row].append(token)
        going = (tokens[:, 0] != eos).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(tokens):
            cache.batch_select_indices(going)
        ids, alive = tokens[going], alive[going]
        mask = torch.cat([mask[going], mask.new_ones(len(going), 1)], dim=1)
        positions = positions[going, -1:] + 1
    return responses


def _left_padded(rows: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask and positions, each [B, T], the shorter rows padded on the left."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)
