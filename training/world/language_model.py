"""The world's language models: Llama's architecture, trained on the grammar's texts by next-token prediction."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steersman.training.world.grammar import Split, draw_copying, draw_prompts, draw_response
from steersman.training.world.progress import track
from steersman.training.world.tokenizer import VOCABULARY, WINDOW

HEAD_DIM = 32  # vLLM's attention on CPU has no smaller head
PROMPT_WEIGHT = 0.1  # the prompt is read, not written: its tokens count little


@dataclass(frozen=True)
class Shape:
    """A model's size and how long it is trained."""

    width: int
    layers: int
    feed_forward: int
    texts: int  # whole conversations read
    copying_texts: int  # short ones read first, which force copying of the item and the name
    learning_rate: float = 3e-3
    batch: int = 16


BASE = Shape(width=160, layers=4, feed_forward=448, texts=24_000, copying_texts=9_600)
EVALUATION = Shape(width=128, layers=2, feed_forward=352, texts=16_000, copying_texts=9_600)
# What guides reads 1 + k tokens for each token of the base: an eighth of its size is as accurate here as a third.
SMALL = Shape(width=64, layers=2, feed_forward=176, texts=16_000, copying_texts=9_600)


def new_model(shape: Shape, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // HEAD_DIM,
        num_key_value_heads=shape.width // HEAD_DIM,
        head_dim=HEAD_DIM,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def draw_texts(split: Split, count: int, seed: int, *, copying: bool = False) -> list[tuple[str, str]]:
    """`count` (prompt, response) texts on the prompts of a split."""
    rng = random.Random(f"texts/{split}/{seed}/{copying}")
    draw = draw_copying if copying else draw_response
    return [(prompt.text, draw(prompt, rng)) for prompt in draw_prompts(split, count, seed)]


def train_language_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int, name: str) -> LlamaForCausalLM:
    """A new model, trained first on copying, then on whole conversations."""
    model = new_model(shape, seed)
    copying = draw_texts("base", shape.copying_texts, seed, copying=True)
    whole = draw_texts("base", shape.texts, seed + 1000)
    _train(model, tokenizer, copying, shape, seed, f"{name}: copying")
    _train(model, tokenizer, whole, shape, seed, f"{name}: conversations")
    return model.eval()


def _train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[tuple[str, str]],
    shape: Shape,
    seed: int,
    description: str,
) -> None:
    """One pass over the texts: AdamW, cosine to 5 % after 5 % of warm-up, gradients clipped to norm 1."""
    batches = list(_batches(tokenizer, texts, shape.batch, seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, len(batches)))
    model.train()
    for ids, weights in track(batches, description):
        loss = _next_token_loss(model(input_ids=ids).logits, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def _cosine(step: int, steps: int, floor: float = 0.05, warm_up: float = 0.05) -> float:
    rise = min(1.0, (step + 1) / (warm_up * steps))
    return rise * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _next_token_loss(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Mean of −w_t log p(ids_t | ids_<t). logits: [B, T, V]; ids, weights: [B, T], weight 0 on padding."""
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    flat = weights[:, 1:].flatten()
    return (losses * flat).sum() / flat.sum()


def _batches(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[tuple[str, str]], size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, weights), each [B, T]; texts of like length share a batch, so that little is padding."""
    prompts = tokenizer([prompt for prompt, _ in texts])["input_ids"]
    responses = tokenizer([response for _, response in texts])["input_ids"]
    rows = [(prompt, [*response, tokenizer.eos_token_id]) for prompt, response in zip(prompts, responses, strict=True)]
    rng = random.Random(seed)
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])) + rng.uniform(-8, 8))
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    rng.shuffle(groups)
    for group in groups:
        length = max(sum(map(len, rows[i])) for i in group)
        ids = torch.full((len(group), length), tokenizer.pad_token_id)
        weights = torch.zeros(len(group), length)
        for position, i in enumerate(group):
            prompt, response = rows[i]
            ids[position, : len(prompt) + len(response)] = torch.tensor(prompt + response)
            weights[position, : len(prompt)] = PROMPT_WEIGHT
            weights[position, len(prompt) : len(prompt) + len(response)] = 1.0
        yield ids, weights
