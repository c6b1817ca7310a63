"""Losses of policy heads, as functions of what a head makes of the base's distribution at every token of a response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from steersman.training.heads.examples import Batch
from steersman.training.heads.frozen_base import FrozenBase
from steersman.training.heads.network import TrainedHead
from steersman.training.outputs import CHUNK

LossName = Literal["sigmoid", "robust", "ipo", "kto", "orpo", "simpo"]


@dataclass(frozen=True)
class PolicyLossSettings:
    """Which loss, and its parameters; those that it lacks are not looked at."""

    name: LossName
    beta: float
    label_smoothing: float = 0.0
    """Of robust."""
    gamma: float = 0.5
    """Of simpo: its margin, before β."""


@dataclass(frozen=True)
class Responses:
    """Sums over the tokens of responses, [B] each, in nats."""

    ratios: Tensor
    """log π(y|x)/π₀(y|x)."""
    logprobs: Tensor
    """log π(y|x)."""
    kl: Tensor
    """Σ_t KL(π ‖ π₀) at the response's own prefixes, of which no gradient is taken."""
    lengths: Tensor


class PolicyLoss:
    """The loss of pairs, a mean over them, for π ∝ π₀ · exp(head)."""

    def __init__(self, settings: PolicyLossSettings, base: FrozenBase) -> None:
        self._settings, self._base = settings, base

    def __call__(self, head: TrainedHead, batch: Batch) -> Tensor:
        values = self._tokens(head, batch["hidden"], batch["tokens"][:, 0])
        owners = batch["owners"]
        count = int(owners.max()) + 1
        sums = values.new_zeros(4, count).index_add(1, owners, torch.cat((values, torch.ones_like(values[:1]))))
        chosen, rejected = (Responses(*sums[:, side::2]) for side in (0, 1))
        return policy_loss(chosen, rejected, self._settings)

    def count(self, batch: Batch) -> Tensor:
        """Pairs."""
        return batch["owners"].max() // 2 + 1

    def _tokens(self, head: TrainedHead, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Of every place: log-ratio and log-probability of its token, and the KL, [3, n]. The base's logits are
        computed of its hidden states, in chunks, and once more for the gradient where there is more than one chunk: all
        of them together would take gigabytes."""
        rows = max(1, CHUNK // self._base.output_rows.shape[0])
        parts = zip(head.features(hidden).split(rows), hidden.split(rows), tokens.split(rows), strict=True)
        if len(hidden) <= rows:
            return torch.cat([self._part(head, *part) for part in parts], dim=1)
        return torch.cat([checkpoint(self._part, head, *part, use_reentrant=False) for part in parts], dim=1)

    def _part(self, head: TrainedHead, features: Tensor, hidden: Tensor, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            reference = self._base.logits(hidden).log_softmax(dim=-1)
        changes = head.every(features)
        guided = reference + changes
        normaliser = guided.logsumexp(dim=-1)
        ratios = changes.gather(1, tokens.unsqueeze(1))[:, 0] - normaliser
        logprobs = ratios + reference.gather(1, tokens.unsqueeze(1))[:, 0]
        if self._settings.name != "kto":
            return torch.stack((ratios, logprobs, torch.zeros_like(ratios)))
        with torch.no_grad():
            kl = (guided.softmax(dim=-1) * changes).sum(dim=-1) - normaliser
        return torch.stack((ratios, logprobs, kl))


def policy_loss(chosen: Responses, rejected: Responses, settings: PolicyLossSettings) -> Tensor:
    """The mean over pairs of one of these losses, as TRL has them but for KTO's reference point.

    sigmoid: DPO, −log σ(βΔ) with Δ the difference of log-ratios.
    robust: the same, with ε = label_smoothing of the labels taken to be wrong.
    ipo: (δ − 1/2β)² with δ the difference of log-ratios per token.
    kto: 1 − σ(β(ratio − z)) of chosen and 1 − σ(β(z − ratio)) of rejected responses, where z is the batch's mean KL,
    exact at every prefix, in place of an estimate from mismatched pairs.
    orpo: −log π of the chosen response per token, − β log σ(difference of log-odds per token).
    simpo: −log σ(β(difference of log π per token) − γ).
    """
    beta, epsilon = settings.beta, settings.label_smoothing
    difference = beta * (chosen.ratios - rejected.ratios)
    if settings.name == "sigmoid":
        return -F.logsigmoid(difference).mean()
    if settings.name == "robust":
        losses = -(1 - epsilon) * F.logsigmoid(difference) + epsilon * F.logsigmoid(-difference)
        return losses.mean() / (1 - 2 * epsilon)
    if settings.name == "ipo":
        each = chosen.ratios / chosen.lengths - rejected.ratios / rejected.lengths
        return (each - 1 / (2 * beta)).square().mean()
    if settings.name == "kto":
        point = torch.cat((chosen.kl, rejected.kl)).mean().clamp(min=0)
        kept = 1 - (beta * (chosen.ratios - point)).sigmoid()
        return torch.cat((kept, 1 - (beta * (point - rejected.ratios)).sigmoid())).mean()
    ours, theirs = (side.logprobs / side.lengths for side in (chosen, rejected))
    if settings.name == "simpo":
        return -F.logsigmoid(beta * (ours - theirs) - settings.gamma).mean()
    odds = _log_odds(ours) - _log_odds(theirs)
    return -ours.mean() - beta * F.logsigmoid(odds).mean()


def _log_odds(logprob: Tensor) -> Tensor:
    """log p/(1 − p)."""
    return logprob - torch.log1p(-logprob.exp())
