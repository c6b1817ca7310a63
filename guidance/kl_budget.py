"""A bound on how far one answer may go from the base model: Σ KL(π_t‖π₀_t) over its positions never exceeds a budget.

The KL of a position is known before its token is drawn, so the sum is kept below the budget on every path, not only in
the mean; by the chain rule its expectation is the KL between the distributions of whole answers.

No position may take more than an eighth of what is left. One that would take more decodes π₀^(1−s)·π^s, for rewards β
shrunk to s·β, with the largest s that keeps to its share: of all distributions with that KL, the one of most reward.
What is left shrinks by an eighth at most, so guidance never runs dry and no length has to be guessed; a strength that
would over-optimise is cut down at every position alike, and one that needs less is left alone. A position where even
the base restricted to the support costs more than its share, as under a top k, is decoded by the base.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steersman.guidance.rows import Steered
from steersman.guidance.transfer import to_device

_HALVINGS = 24
SHARE = 1 / 8
"""Of what is left that one position may take."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """Rows made to fit what is left of their budgets."""

    scores: torch.Tensor
    """[n, C] log π of the weakened distribution, up to a constant."""
    kl: torch.Tensor
    """[n] KL of each row's distribution, nats; 0 where the base decodes."""
    fits: torch.Tensor
    """[n] bool; False where even the base model restricted to the support costs more than its share."""


def fit_budgets(
    steered: Sequence[Steered], scores: torch.Tensor, base_logprobs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weakens those rows of `scores` [G, C] that have a budget, and counts what they spend.

    Returns scores and [G] bool: False where a row does not fit and the base decodes. What is left of a budget is the
    host's: with one in the batch it waits for the device.
    """
    fits = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    lines = [n for n, s in enumerate(steered) if s.row.request.plan.kl_budget is not None]
    if not lines:
        return scores, fits
    requests = [steered[n].row.request for n in lines]
    places = to_device(lines, scores.device)
    left = to_device([request.budget_left for request in requests], scores.device, scores.dtype)
    fitted = fit_budget(scores[places], base_logprobs[places], left)
    for request, kl in zip(requests, fitted.kl.tolist(), strict=True):
        request.spent[-1] = kl
    return scores.index_copy(0, places, fitted.scores), fits.index_copy(0, places, fitted.fits)


def fit_budget(scores: torch.Tensor, base_logprobs: torch.Tensor, left: torch.Tensor) -> Fitted:
    """scores: log π up to a constant [n, C]; base_logprobs: log π₀ of the same tokens [n, C], -inf where masked;
    left: [n] nats."""
    absent = base_logprobs.isneginf() | scores.isneginf()
    base = base_logprobs.masked_fill(absent, 0.0)
    direction = scores.masked_fill(absent, 0.0) - base
    allowed = SHARE * left

    def at(strength: torch.Tensor) -> torch.Tensor:
        return (base + strength.unsqueeze(-1) * direction).masked_fill(absent, -torch.inf)

    strength = torch.ones_like(left)
    kl = _support_kl(at(strength), base_logprobs)
    exceeds = kl > allowed
    if bool(exceeds.any()):
        low, high = torch.zeros_like(strength), strength
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            fits = _support_kl(at(middle), base_logprobs) <= allowed
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        strength = torch.where(exceeds, low, strength)
        kl = _support_kl(at(strength), base_logprobs)
    fits = kl <= allowed
    return Fitted(at(strength), torch.where(fits, kl, 0.0), fits)


def _support_kl(scores: torch.Tensor, base_logprobs: torch.Tensor) -> torch.Tensor:
    logprobs = scores.log_softmax(dim=-1)
    ratio = (logprobs - base_logprobs).masked_fill(logprobs.isneginf(), 0.0)
    return (logprobs.exp() * ratio).sum(dim=-1)
