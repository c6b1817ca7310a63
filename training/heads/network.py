"""A head while it is trained: on standardised hidden states, its token rows free or made of the base's embedding."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steersman.guidance.heads import Head, HeadShape, fold_standardisation
from steersman.training.heads.frozen_base import FrozenBase

STORED = torch.float16
"""Precision of U in the file of a head: most of its numbers, whose rounding moves outputs by less than a thousandth of
what they differ by."""


class TrainedHead(nn.Module):
    """U[v] · f(x) + c[v] of standardised hidden states x, with dropout; `fold` makes a plain head of it.

    Its outputs start at 0, so that a policy starts as the base: U and c are 0, and f is not. A token that no row holds
    thus keeps its 0, where a random row of U would give it a reward that grows with f and that guidance would find.
    """

    def __init__(
        self,
        shape: HeadShape,
        moments: tuple[Tensor, Tensor],
        *,
        dropout: float = 0.0,
        embedding: Tensor | None = None,
        value: bool = False,
    ) -> None:
        """moments: mean and deviation [D] of hidden states. embedding: E [V, D], of which U is made as E·P; else U is
        free. value: whether a column of ones stands in U beside its `rank` others, for what is the same for every
        token."""
        super().__init__()
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", moments[0])
        self.register_buffer("deviation", moments[1])
        self.value = value
        self.inner = nn.Linear(shape.hidden_size, shape.width)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(shape.width, shape.rank + value)
        if value:  # a row of its own, which is not multiplied by U
            nn.init.zeros_(self.outer.weight[-1])
            nn.init.zeros_(self.outer.bias[-1:])
        self.embedding: Tensor | None
        self.register_buffer("embedding", None if embedding is None else _normalise(embedding), persistent=False)
        if embedding is None:
            self.tokens = nn.Parameter(torch.zeros(shape.vocabulary, shape.rank))
            self.bias = nn.Parameter(torch.zeros(shape.vocabulary))
        else:
            # P, and the vector that makes c of E.
            size = embedding.shape[1]
            self.tokens = nn.Parameter(torch.zeros(size, shape.rank))
            self.bias = nn.Parameter(torch.zeros(size))

    def features(self, hidden: Tensor) -> Tensor:
        """f [..., R] float32 of hidden states [..., D] of any precision."""
        inner = F.silu(self.inner((hidden.float() - self.mean) / self.deviation))
        outer: Tensor = self.outer(self.dropout(inner))
        return outer

    def at(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Outputs [n, k] float32 for the tokens [n, k] of each row of features [n, R]."""
        if self.embedding is None:
            rows, bias = F.embedding(tokens, self.tokens), self.bias[tokens]
        else:
            embedded = F.embedding(tokens, self.embedding)
            rows, bias = embedded @ self.tokens, embedded @ self.bias
        own = features[..., : rows.shape[-1]]
        outputs = torch.einsum("nkr,nr->nk", rows, own) + bias
        return outputs + features[..., -1:] if self.value else outputs

    def every(self, features: Tensor) -> Tensor:
        """Outputs [n, V] float32 for every token."""
        rows, bias = self._rows()
        outputs = F.linear(features[..., : rows.shape[-1]], rows, bias)
        return outputs + features[..., -1:] if self.value else outputs

    @torch.no_grad()
    def fold(self, scale: float = 1.0, shift: float = 0.0) -> Head:
        """The head, on the CPU, whose outputs on plain hidden states are these, times `scale` plus `shift`. Its rows of
        tokens are rounded to the precision in which they are saved."""
        rows, bias = self._rows()
        rows = torch.cat((rows, rows.new_ones(len(rows), 1)), dim=1) if self.value else rows
        head = Head(HeadShape(self.inner.in_features, self.inner.out_features, rows.shape[1], len(rows)))
        head.inner.load_state_dict(self.inner.state_dict())
        head.outer.load_state_dict({name: scale * tensor for name, tensor in self.outer.state_dict().items()})
        head.tokens.data = rows.to(STORED).float().cpu()
        head.bias.data = (scale * bias + shift).cpu()
        fold_standardisation(head.inner.cpu(), self.mean.cpu(), self.deviation.cpu())
        return head.cpu().eval().requires_grad_(False)

    def _rows(self) -> tuple[Tensor, Tensor]:
        """U [V, R] without the value's column, and c [V]."""
        if self.embedding is None:
            return self.tokens, self.bias
        return self.embedding @ self.tokens, self.embedding @ self.bias


class HeadSizes(Protocol):
    """The options of a head's network, whichever command they are given to."""

    head_width: int
    head_rank: int
    head_dropout: float
    head_tokens: Literal["free", "embedding"]


def build_network(
    arguments: HeadSizes, base: FrozenBase, moments: tuple[Tensor, Tensor], *, value: bool
) -> TrainedHead:
    """An untrained network of the sizes in `arguments`; moments and value as for TrainedHead."""
    shape = HeadShape(base.facts.hidden_size, arguments.head_width, arguments.head_rank, base.facts.vocabulary)
    embedding = base.output_rows if arguments.head_tokens == "embedding" else None
    return TrainedHead(shape, moments, dropout=arguments.head_dropout, embedding=embedding, value=value)


def _normalise(embedding: Tensor) -> Tensor:
    """An embedding [V, D] in float32 without its mean, of mean square 1: the rate at which P learns is then the same
    for all bases."""
    centred = embedding.float() - embedding.float().mean(dim=0)
    return centred / centred.square().mean().sqrt()
