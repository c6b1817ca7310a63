"""Heads of random weights, with and without a base model behind them."""

import random

import torch

from steersman.guidance.head_files import POLICY, BaseFacts, HeadCheckpoint, Probe
from steersman.guidance.head_models import HeadModel, HeadPolicy, HeadReward
from steersman.guidance.heads import FrozenHead, Head, HeadShape


def random_checkpoint(
    rng: random.Random, role: str, vocabulary: int | None = None, hidden_size: int | None = None
) -> HeadCheckpoint:
    """A head of random weights, and of random sizes where none are given, with probe texts of different lengths and
    random hidden states."""
    hidden_size = hidden_size or rng.randint(5, 20)
    shape = HeadShape(hidden_size, rng.randint(3, 9), rng.randint(2, 6), vocabulary or rng.randint(30, 60))
    head = Head(shape).requires_grad_(False)
    head.bias.normal_()
    texts = [[rng.randrange(shape.vocabulary) for _ in range(rng.randint(1, 9))] for _ in range(4)]
    probe = Probe(texts, torch.randn(4, shape.hidden_size))
    facts = {"objective": "head", "accuracy": {"0.5": rng.random()}}
    return HeadCheckpoint(head, role, BaseFacts("llama", shape.hidden_size, 3, shape.vocabulary), probe, facts)


def random_head(rng: random.Random, name: str, role: str, vocabulary: int, hidden_size: int | None = None) -> HeadModel:
    """A reward model or policy on hidden states of any base."""
    kind = HeadPolicy if role == POLICY else HeadReward
    return kind(random_checkpoint(rng, role, vocabulary, hidden_size), name, "cpu")


def head_table(head: FrozenHead, hidden: torch.Tensor) -> torch.Tensor:
    """Outputs [B, V] for hidden states [B, D], in float64 and token by token."""
    names = ("inner", "inner_bias", "outer", "outer_bias", "tokens", "bias")
    inner, inner_bias, outer, outer_bias, tokens, bias = (getattr(head.weights, name).double() for name in names)
    middle = hidden.double() @ inner + inner_bias
    features = (middle / (1 + torch.exp(-middle))) @ outer + outer_bias
    return (features.unsqueeze(1) * tokens).sum(dim=-1) + bias
