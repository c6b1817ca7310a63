"""A bound on how far one answer may go from the base model: Σ KL(π_t‖π₀_t) over its positions never exceeds a budget.

The KL of a position is known before its token is drawn, so the sum is kept below the budget on every path, not only in
the mean; by the chain rule its expectation is the KL between the distributions of whole answers. The step that would
exceed what is left is weakened along the geometric path π₀^(1−s)·π^s, on which KL rises with s, to the largest s
that fits; from then on the base decodes.
"""

from dataclasses import dataclass

import torch

_HALVINGS = 24


@dataclass(frozen=True, slots=True)
class Fitted:
    """Rows made to fit what is left of their budgets."""

    scores: torch.Tensor
    """[n, C], weakened where necessary."""
    kl: torch.Tensor
    """[n] KL of each row's distribution, nats."""
    fits: torch.Tensor
    """[n] bool; False where even the base model restricted to the support costs more than is left."""
    ends: torch.Tensor
    """[n] bool: the budget is spent after this step."""


def fit_budget(scores: torch.Tensor, base_logprobs: torch.Tensor, left: torch.Tensor) -> Fitted:
    """scores: log π up to a constant [n, C]; base_logprobs: log π₀ of the same tokens [n, C], -inf where masked;
    left: [n] nats, infinite where there is no bound."""
    kl = _support_kl(scores, base_logprobs)
    over = kl > left
    fits = torch.ones_like(over)
    if bool(over.any()):
        scores, kl = scores.clone(), kl.clone()
        weakened, cost = _weaken(scores[over], base_logprobs[over], left[over])
        scores[over], kl[over] = weakened, cost
        fits[over] = cost <= left[over]
    return Fitted(scores, kl, fits, over)


def _weaken(scores: torch.Tensor, base_logprobs: torch.Tensor, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    absent = base_logprobs.isneginf() | scores.isneginf()
    base = base_logprobs.masked_fill(absent, 0.0)
    direction = scores.masked_fill(absent, 0.0) - base

    def at(strength: torch.Tensor) -> torch.Tensor:
        return (base + strength.unsqueeze(-1) * direction).masked_fill(absent, -torch.inf)

    low, high = torch.zeros_like(left), torch.ones_like(left)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = _support_kl(at(middle), base_logprobs) <= left
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    best = at(low)
    return best, _support_kl(best, base_logprobs)


def _support_kl(scores: torch.Tensor, base_logprobs: torch.Tensor) -> torch.Tensor:
    logprobs = scores.log_softmax(dim=-1)
    ratio = (logprobs - base_logprobs).masked_fill(logprobs.isneginf(), 0.0)
    return (logprobs.exp() * ratio).sum(dim=-1)
