"""Losses of policies that TRL does not have: two-dimensional and token-level DPO, as pure functions of log-ratios.

A log-ratio is log π(y_t | x, y_<t) − log π_ref(y_t | x, y_<t) of one token, in nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

WEIGHTS = (0.3, 0.4, 0.1, 0.1, 0.1)
"""Of helpfulness, correctness, safety, completeness and clarity."""
HIGHEST_SCORE = 4.0


@dataclass(frozen=True)
class Segments:
    """One side of a batch of pairs, segment by segment."""

    ratios: Tensor
    """[B, S]: Σ over the segment's tokens of the log-ratio."""
    scores: Tensor
    """[B, S, 5]: of every aspect, 0 to 4."""
    mask: Tensor
    """[B, S] bool: False where a response has no such segment."""


def two_dimensional_dpo(
    chosen: Segments, rejected: Segments, beta: float, weights: tuple[float, ...] = WEIGHTS
) -> Tensor:
    """2D-DPO: L = −mean over pairs of Σ_k log σ( β' r_{w,k} Σ log-ratios − β' r_{l,k} Σ log-ratios ).

    A segment's reward is r = Σ_a weight_a (score_a / 4 + 1). With N the smaller number of segments of the two, the N
    best segments of the chosen response are paired by rank with the N worst of the rejected one: the best with the
    worst, and so on; of equal ones the earlier comes first. β' = β over the mean reward of the 2 N that were selected,
    so that a pair weighs as much as in DPO with β. `weights` (1, 0, 0, 0, 0) is 1D-DPO.
    """
    table = torch.tensor(weights, dtype=chosen.ratios.dtype, device=chosen.ratios.device)
    count = torch.minimum(chosen.mask.sum(dim=1), rejected.mask.sum(dim=1))
    most = int(count.max())
    kept = torch.arange(most, device=count.device) < count.unsqueeze(1)
    best, best_ratios = _select(chosen, table, most, descending=True)
    worst, worst_ratios = _select(rejected, table, most, descending=False)
    mean = ((best + worst) * kept).sum(dim=1) / (2 * count)
    scale = (beta / mean).unsqueeze(1)
    terms = functional.logsigmoid(scale * (best * best_ratios - worst * worst_ratios))
    return -torch.where(kept, terms, 0.0).sum(dim=1).mean()


def _select(side: Segments, weights: Tensor, most: int, *, descending: bool) -> tuple[Tensor, Tensor]:
    """Rewards and log-ratios [B, most] of the segments in order of reward; what is not there comes last, as 0."""
    rewards = (side.scores / HIGHEST_SCORE + 1) @ weights
    absent = -torch.inf if descending else torch.inf
    # Rewards that differ by the rounding of their sums alone are ties.
    places = (rewards * 1e6).round().masked_fill(~side.mask, absent)
    order = places.argsort(dim=1, descending=descending, stable=True)[:, :most]
    there = side.mask.gather(1, order)
    chosen, ratios = rewards.gather(1, order), side.ratios.gather(1, order)
    return torch.where(there, chosen, 0.0), torch.where(there, ratios, 0.0)


def token_level_dpo(
    chosen_ratio: Tensor,
    rejected_ratio: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    beta: float,
    alpha: float,
    version: Literal[1, 2],
) -> Tensor:
    """TDPO: L = −mean log σ( u − δ ) with u = β (Σ log-ratios of the chosen − those of the rejected response).

    Version 1: δ = β (D_l − D_w); version 2: δ = α (β D_l − sg(β D_w)), where D = Σ_t KL(π_ref(·|y_<t) ‖ π(·|y_<t)) is
    the sequential KL of the chosen (w) and the rejected (l) response and sg lets no gradient through.

    chosen_ratio, rejected_ratio: [B], summed over tokens; chosen_kl, rejected_kl: [B], nats.
    """
    margin = beta * (chosen_ratio - rejected_ratio)
    divergence = rejected_kl - chosen_kl if version == 1 else alpha * (rejected_kl - chosen_kl.detach())
    return -functional.logsigmoid(margin - beta * divergence).mean()


def sequential_kl(reference: Tensor, policy: Tensor, mask: Tensor) -> Tensor:
    """D_SeqKL(x, y; π_ref ‖ π) = Σ_t KL(π_ref(·|y_<t) ‖ π(·|y_<t)).

    reference, policy: [B, T, V] logits; mask: [B, T] bool, the response's tokens → [B], nats.
    """
    reference, policy = reference.log_softmax(dim=-1), policy.log_softmax(dim=-1)
    each = (reference.exp() * (reference - policy)).sum(dim=-1)
    return torch.where(mask, each, 0.0).sum(dim=1)
