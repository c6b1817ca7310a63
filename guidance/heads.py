"""Heads on the base model's own hidden state: a reward, or a change of log-probability, of every next token at once.

For a prefix s whose last hidden state in the base, as its output layer takes it, is h(s)

    head(s·v) = U[v] · f(h(s)) + c[v],    f(h) = W₂ silu(W₁ h + b₁) + b₂

f is computed once a row, in float32 whatever the base's precision; of U only the rows of the tokens in question are
read. A term that is the same for every v, such as the value of the prefix, is a column of ones in U.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from steersman.kernels.arguments import BlendedRows, BlendRows, HeadWeights
from steersman.kernels.dispatch import (
    blend_head,
    choose_rank,
    compile_gather,
    compile_head_blend,
    compile_head_rerank,
    gather_outputs,
)


@dataclass(frozen=True)
class HeadShape:
    """Sizes of a head: D of the base's hidden state, W of the perceptron's middle, R of f(h), V of the vocabulary."""

    hidden_size: int
    width: int
    rank: int
    vocabulary: int


class Head(nn.Module):
    """A head as a trainable module: U[v] · f(h) + c[v]."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.inner = nn.Linear(shape.hidden_size, shape.width)
        """W₁ [W, D] and b₁ [W]."""
        self.outer = nn.Linear(shape.width, shape.rank)
        """W₂ [R, W] and b₂ [R]."""
        self.tokens = nn.Parameter(torch.empty(shape.vocabulary, shape.rank).normal_(std=shape.rank**-0.5))
        """U [V, R], one row for each token."""
        self.bias = nn.Parameter(torch.zeros(shape.vocabulary))
        """c [V], one constant for each token."""

    @property
    def vocabulary(self) -> int:
        """Tokens that it has an output for."""
        return len(self.tokens)

    @property
    def shape(self) -> HeadShape:
        """Its sizes."""
        (vocabulary, rank), (width, hidden_size) = self.tokens.shape, self.inner.weight.shape
        return HeadShape(hidden_size, width, rank, vocabulary)

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """f(h) [..., R] float32 of hidden states [..., D] of any precision."""
        outer: torch.Tensor = self.outer(F.silu(self.inner(hidden.float())))
        return outer

    def every(self, features: torch.Tensor) -> torch.Tensor:
        """Outputs [..., V] float32 for every token."""
        return F.linear(features, self.tokens, self.bias)

    def at(self, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Outputs [G, k] float32 for the tokens [G, k] int64 of each row of features [G, R]."""
        return gather_outputs(features, self.tokens, self.bias, tokens)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Outputs [..., V] of hidden states [..., D]."""
        return self.every(self.features(hidden))


class FrozenHead:
    """A head that is not trained any more, without what a module adds to every call: an OutputLayer."""

    def __init__(self, head: Head, device: torch.device | str) -> None:
        def move(parameter: torch.Tensor, more: int = 0) -> torch.Tensor:
            return F.pad(parameter.detach().float(), (0, more)).to(device).contiguous()

        self.shape = head.shape
        more = choose_rank(self.shape.rank, torch.device(device)) - self.shape.rank
        self.weights = HeadWeights(
            inner=move(head.inner.weight.t()),
            inner_bias=move(head.inner.bias),
            outer=move(head.outer.weight.t(), more),
            outer_bias=move(head.outer.bias, more),
            tokens=move(head.tokens, more),
            bias=move(head.bias),
        )
        self.device = self.weights.bias.device

    @property
    def vocabulary(self) -> int:
        """Tokens that it has an output for."""
        return self.shape.vocabulary

    @property
    def size(self) -> int:
        """Bytes of its weights, as they lie on the device."""
        own = (
            self.weights.inner,
            self.weights.inner_bias,
            self.weights.outer,
            self.weights.outer_bias,
            self.weights.tokens,
            self.weights.bias,
        )
        return sum(tensor.numel() * tensor.element_size() for tensor in own)

    def warm_up(self) -> None:
        """Compiles on a GPU what `at` launches."""
        compile_gather(self.weights.tokens, self.weights.bias)

    def warm_up_blend(self, vocabulary: int) -> None:
        """Compiles on a GPU what `blend` launches over logits [B, vocabulary]."""
        compile_head_blend(self.weights.tokens, self.weights.bias, vocabulary)

    def warm_up_rerank(self, vocabulary: int) -> None:
        """Compiles on a GPU what a step launches whose candidates it scores, over logits [B, vocabulary]."""
        compile_head_rerank(self.weights.tokens, vocabulary)

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """f(h) [G, R] float32 of hidden states [G, D], as Head.features, followed by zeros where the device reads
        longer rows faster."""
        return self.weights.features(hidden.float())

    def every(self, features: torch.Tensor) -> torch.Tensor:
        """Outputs [G, V] float32 for every token, as Head.every."""
        return F.linear(features, self.weights.tokens, self.weights.bias)

    def at(self, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Outputs [G, k] float32 for the tokens [G, k], as Head.at."""
        return gather_outputs(features, self.weights.tokens, self.weights.bias, tokens)

    def blend(
        self, logits: torch.Tensor, features: torch.Tensor, asked: BlendRows, samples: int, gated: bool
    ) -> BlendedRows:
        """Mixes log π₀ + outputs into rows of the base's `logits` in place, by `kernels.head_blend`; for a device with
        kernels."""
        return blend_head(logits, features, self.weights.tokens, self.weights.bias, asked, samples, gated)


def build_head(tensors: dict[str, torch.Tensor]) -> Head:
    """A head of weights under the names of its parameters; raises KeyError or ValueError where they are not a head's
    or do not fit one another."""
    (vocabulary, rank), (width, hidden_size) = tensors["tokens"].shape, tensors["inner.weight"].shape
    head = Head(HeadShape(hidden_size, width, rank, vocabulary))
    own = head.state_dict()
    if set(tensors) != set(own):
        raise ValueError(f"a head has the tensors {', '.join(own)}, not {', '.join(sorted(tensors))}")
    wrong = [name for name in own if tensors[name].shape != own[name].shape]
    if wrong:
        raise ValueError(f"{wrong[0]} is {list(tensors[wrong[0]].shape)}, not {list(own[wrong[0]].shape)}")
    head.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return head.eval().requires_grad_(False)


def fold_standardisation(inner: nn.Linear, mean: torch.Tensor, deviation: torch.Tensor) -> None:
    """Makes a layer that was trained on (h − mean) / deviation, both [D], take h itself, in place."""
    with torch.no_grad():
        inner.weight.div_(deviation)
        inner.bias.sub_(inner.weight @ mean)


def describe_shape(shape: HeadShape) -> dict[str, Any]:
    """What users are shown of a head's sizes."""
    return {"rank": shape.rank, "parameters": count_parameters(shape)}


def count_parameters(shape: HeadShape) -> int:
    """Numbers of a head of these sizes."""
    perceptron = (shape.hidden_size + 1) * shape.width + (shape.width + 1) * shape.rank
    return perceptron + shape.vocabulary * (shape.rank + 1)
