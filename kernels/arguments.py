"""What the kernels and their torch twins are given and return, row by row."""

from dataclasses import dataclass

import torch

LARGEST_SAMPLE = 1024
"""Draws of a policy that a kernel makes for one row at most."""


@dataclass(frozen=True, slots=True)
class RewardTerms:
    """Σ_m strength_m T_m(r_m) of each row, [B, M] each; a row with fewer terms has strength 0 in the others."""

    strength: torch.Tensor
    """β · weight, float32."""
    scale: torch.Tensor
    shift: torch.Tensor
    log_sigmoid: torch.Tensor
    """int32: T(r) = log σ(scale · r + shift) where it is 1, scale · r + shift where it is 0."""


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
