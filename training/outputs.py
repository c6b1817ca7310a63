"""A model's outputs at the tokens where they are needed; padding is known by its place, never by its token id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from steersman.guidance.checkpoints import find_language_head
from steersman.training.lora import without_wrapper

CHUNK = 2**24
"""Elements of the largest tensor that one chunk of outputs needs."""


@contextmanager
def token_scores(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the scores at every token, [B, T, C], that a causal classifier's forward pools only the last of.

    A hook on the score head rather than a call to the inner model: wrappers around the model keep seeing its forward.
    """
    scores: list[Tensor] = []
    head = without_wrapper(model).get_submodule("score")
    handle = head.register_forward_hook(lambda _head, _inputs, output: scores.append(output))
    try:
        yield scores
    finally:
        handle.remove()


def pools_by_place(model: nn.Module) -> bool:
    """Whether a classifier's scores can be read at every token, and so at the last one by the attention mask."""
    return hasattr(without_wrapper(model), "score")


def end_scores(model: nn.Module, unwrapped: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """A classifier's scores [B, C] of rows [B, T] that are padded on the right.

    A causal classifier of transformers pools at the last token that is not the padding token. Where that is the end
    token too, it would never pool at an end: the score is taken at the last token that the mask attends to.
    unwrapped: the model itself, whose head is looked at; `model` may be what distributes it.
    """
    if not pools_by_place(unwrapped):
        return model(input_ids=ids, attention_mask=mask).logits
    with token_scores(unwrapped) as scores:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return scores[0][torch.arange(len(ids), device=ids.device), mask.sum(dim=1) - 1]


def token_logits(
    model: nn.Module, unwrapped: nn.Module, inputs: dict[str, Any], positions: Tensor, tokens: Tensor
) -> Tensor:
    """Logits [N, P, k] that the forward before positions [N, P] gives to `tokens` [N, P, k], and to no others.

    The head's rows of these tokens are multiplied with the hidden states before them: a whole vocabulary's logits of
    a long row take gigabytes. What an architecture does to logits after its head (scales, soft caps) is kept.
    unwrapped: as in `end_scores`.
    """
    head = output_layer(unwrapped)
    before = positions.clamp(min=1) - 1

    def forward(hidden: Tensor) -> Tensor:
        return _taken(hidden.gather(1, before.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])), head, tokens)

    with _replaced_forward(head, forward):
        logits: Tensor = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).logits
    return logits


@torch.no_grad()
def likeliest_tokens(
    model: nn.Module, inputs: dict[str, Any], positions: Tensor, count: int, vocabulary: int
) -> Tensor:
    """The `count` likeliest tokens [N, P, count], of ids below `vocabulary`, that a frozen model predicts at positions
    [N, P]."""
    head, before = output_layer(model), positions.clamp(min=1) - 1
    found: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        selected = hidden.gather(1, before.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])).flatten(0, 1)
        # What comes after the head keeps the order of logits.
        for part in selected.split(max(1, CHUNK // head.weight.shape[0])):
            logits = functional.linear(part, head.weight, head.bias)[:, :vocabulary]
            found.append(logits.topk(count).indices)
        return hidden[..., :1]

    with _replaced_forward(head, forward):
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    return torch.cat(found).view(*positions.shape, count)


@torch.no_grad()
def token_log_probabilities(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """log p of every token of rows [N, T] but the first, given those before it: [N, T - 1] float32."""
    plain: Any = without_wrapper(model)
    head, width = find_language_head(plain), output_layer(model).out_features
    hidden = plain.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    rows = max(1, CHUNK // width)
    parts = zip(hidden.flatten(0, 1).split(rows), ids[:, 1:].flatten().split(rows), strict=True)
    losses = [functional.cross_entropy(head(part).float(), own, reduction="none") for part, own in parts]
    return -torch.cat(losses).view(len(ids), -1)


def output_layer(model: nn.Module) -> Any:
    """The linear layer of a language model's head, inside of PEFT's wrapper if it is trained beside an adapter."""
    head: Any = without_wrapper(model).get_output_embeddings()
    return head.modules_to_save[head.active_adapters[0]] if hasattr(head, "modules_to_save") else head


def _taken(hidden: Tensor, head: Any, tokens: Tensor) -> Tensor:
    """Logits [N, P, k] of tokens [N, P, k] given hidden states [N, P, H]. Chunks are computed again for the gradient,
    since the head's rows of all tokens would be k times as large as the hidden states."""
    rows = max(1, CHUNK // (tokens.shape[-1] * hidden.shape[-1]))
    parts = zip(hidden.flatten(0, 1).split(rows), tokens.flatten(0, 1).split(rows), strict=True)
    logits = [
        checkpoint(_logits_of, part, head.weight, head.bias, own, use_reentrant=False, preserve_rng_state=False)
        for part, own in parts
    ]
    return torch.cat(logits).view(tokens.shape)


def _logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
    logits = (functional.embedding(tokens, weight) @ hidden.unsqueeze(-1)).squeeze(-1)
    return logits if bias is None else logits + bias[tokens]


@contextmanager
def _replaced_forward(layer: Any, forward: Any) -> Iterator[None]:
    """The module stays in its place: what wraps it, and what distributes its weights, keeps seeing its call."""
    own = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own
