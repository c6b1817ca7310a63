"""What the kernels and their torch twins are given and return, row by row."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

LARGEST_SAMPLE = 1024
"""Draws of a policy that a kernel makes for one row at most."""


@dataclass(frozen=True)
class RewardTerms:
    """Σ_m strength_m T_m(r_m) of each row, [B, M] each; a row with fewer terms has strength 0 in the others."""

    strength: torch.Tensor
    """β · weight, float32."""
    scale: torch.Tensor
    shift: torch.Tensor
    log_sigmoid: torch.Tensor
    """int32: T(r) = log σ(scale · r + shift) where it is 1, scale · r + shift where it is 0."""

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The same on a CPU: they outlive many steps."""
        return self.strength.numpy(), self.scale.numpy(), self.shift.numpy(), self.log_sigmoid.numpy()


@dataclass(frozen=True)
class HeadWeights:
    """A head on the base's hidden states, U[v] · f(h) + c[v] with f(h) = W₂ silu(W₁ h + b₁) + b₂; float32."""

    inner: torch.Tensor
    """W₁ transposed, [D, W]."""
    inner_bias: torch.Tensor
    outer: torch.Tensor
    """W₂ transposed, [W, R]."""
    outer_bias: torch.Tensor
    tokens: torch.Tensor
    """U, [V, R]."""
    bias: torch.Tensor
    """c, [V]."""

    @cached_property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The same on a CPU, in this order."""
        own = (self.inner, self.inner_bias, self.outer, self.outer_bias, self.tokens, self.bias)
        return tuple(tensor.numpy() for tensor in own)

    def features(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """f(h) [G, R] float32 of hidden states [G, D] float32, written to `out` where it is given."""
        middle = torch.addmm(self.inner_bias, hidden, self.inner)
        return torch.addmm(self.outer_bias, F.silu(middle, inplace=True), self.outer, out=out)


@dataclass(frozen=True)
class HeadRows:
    """Rows whose candidates heads score, [G], the same in many steps."""

    rows: torch.Tensor
    """int64: their places in the base's logits and hidden states."""
    k: int
    """Candidates of a row."""
    limits: torch.Tensor | None
    """[G, 1]: candidates of each row, at most k; None where each has k."""
    heads: Sequence[HeadWeights]
    """One for each term."""
    terms: RewardTerms
    table: torch.Tensor | None = None
    """[M, 6] int64: where the heads lie, on a device with kernels, see `dispatch.tabulate_heads`."""

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and limits [G] on a CPU; no limits where each row has k."""
        limits = np.empty(0, dtype=np.int64) if self.limits is None else self.limits.squeeze(1).numpy()
        return self.rows.numpy(), limits


class Reranked:
    """What became of HeadRows in up to N steps, on the host: the reports of many answers are read from it."""

    def __init__(self, steps: int, asked: HeadRows) -> None:
        shape = (steps, len(asked.rows), asked.k)
        self.steps = steps
        self.ids = np.empty(shape, dtype=np.int64)
        """[N, G, k]"""
        self.values = np.empty(shape, dtype=np.float32)
        """[N, G, k]: the base's logits, -inf beyond a row's limit."""
        self.logprobs = np.empty(shape, dtype=np.float32)
        """[N, G, k]: the base's, over the whole vocabulary."""
        self.scores = np.empty(shape, dtype=np.float32)
        """[N, G, k], as `kernels.rerank.reward_rerank` returns them; rows of NaN were not written."""
        self.rewards = np.empty((*shape[:2], len(asked.heads), asked.k), dtype=np.float32)
        """[N, G, M, k]"""


@dataclass(frozen=True, slots=True)
class HeadReranked:
    """What became of HeadRows in one step, on a device with kernels."""

    ids: torch.Tensor
    """[G, k] int64"""
    values: torch.Tensor
    """[G, k] float32: the base's logits, -inf beyond a row's limit and for a token that one of the heads does not
    have."""
    logprobs: torch.Tensor
    """[G, k] float32: the base's, over the whole vocabulary, -inf beyond a row's limit."""
    scores: torch.Tensor
    """[G, k] float32, as `kernels.rerank.reward_rerank` returns them."""
    rewards: torch.Tensor
    """[G, M, k] float32; of a token that a head does not have, that of its last one."""
    broken: torch.Tensor
    """[G] bool: rows whose scores are NaN, which were not written."""


@dataclass(frozen=True)
class MixRows:
    """Rows that one policy, a head on the base's hidden states, is mixed into; [G], the same in many steps."""

    rows: torch.Tensor
    """int64: their places in the base's logits and hidden states."""
    coefficients: torch.Tensor
    """[G, 2] float32: of log base and log policy."""
    head: HeadWeights
    """With an output for every token of the base's logits."""

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and coefficients on a CPU."""
        return self.rows.numpy(), self.coefficients.numpy()


@dataclass(frozen=True)
class Mixed:
    """Rows that a policy was mixed into, before and after: [G, V] float32."""

    base: torch.Tensor
    guided: torch.Tensor
    base_total: torch.Tensor
    """[G] float32: log-sum-exp of `base`."""
    guided_total: torch.Tensor
    changed: torch.Tensor
    """[G] bool: whether no token is the most likely one in both."""
    kept: torch.Tensor
    """[G] bool: rows that were written."""

    @classmethod
    def empty(cls, rows: int, vocabulary: int) -> "Mixed":
        """Memory for as many rows."""
        base, guided = np.empty((2, rows, vocabulary), dtype=np.float32)
        base_total, guided_total = np.empty((2, rows), dtype=np.float32)
        changed, kept = np.empty((2, rows), dtype=np.bool_)
        return cls(*map(torch.from_numpy, (base, guided, base_total, guided_total, changed, kept)))

    @cached_property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The same in this order: they outlive many steps."""
        own = (self.base, self.guided, self.base_total, self.guided_total, self.changed, self.kept)
        return tuple(tensor.numpy() for tensor in own)


@dataclass(frozen=True, slots=True)
class BlendRows:
    """What each row that is blended with a policy asks for; [B] each."""

    rows: torch.Tensor
    """int32: row of the base's logits; below 0 nothing is written."""
    threshold: torch.Tensor
    """float32, nats: the gate is open where KL(policy‖base) exceeds it; -inf without a gate."""
    above: torch.Tensor
    """[B, 2] float32: coefficients of log base and log policy where the gate is open."""
    below: torch.Tensor
    """[B, 2] float32: the same where it is closed."""
    seeds: torch.Tensor
    """int64: of the row's samples."""


@dataclass(frozen=True, slots=True)
class Blended:
    """What became of each row; [B] each."""

    kl: torch.Tensor
    """float32, nats: KL(policy‖base), exact."""
    estimate: torch.Tensor
    """float32, nats: the same from samples; the exact one where none are drawn."""
    opened: torch.Tensor
    """int32: 1 where the gate is open."""


@dataclass(frozen=True, slots=True)
class BlendedRows(Blended):
    """What became of each row, with its logits before and after, [B, V] float32; the others [B]."""

    base: torch.Tensor
    guided: torch.Tensor
    base_total: torch.Tensor
    """float32: log-sum-exp of `base`."""
    guided_total: torch.Tensor
    changed: torch.Tensor
    """bool: whether no token is the most likely one in both."""
