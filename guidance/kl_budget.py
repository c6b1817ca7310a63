"""A bound on how far one answer may go from the base model: Σ KL(π_t‖π₀_t) over its positions never exceeds a budget.

The KL of a position is known before its token is drawn, so the sum is kept below the budget on every path, not only in
the mean; by the chain rule its expectation is the KL between the distributions of whole answers.

Guidance fades rather than stops: a position decodes π₀^(1−s)·π^s, for rewards β shrunk to s·β, where s is the share of
the budget that is left. KL grows with the square of s, so what is left falls like 1/(1 + t·c/B) for a full-strength
cost of c nats a token: strong guidance is not spent on the first few tokens, weak guidance is hardly touched, and no
horizon has to be guessed. A step that would still exceed what is left is weakened along the same path until it fits;
where even the base restricted to the support costs more, as under a top k, guidance ends.
"""

from dataclasses import dataclass

import torch

_HALVINGS = 24


@dataclass(frozen=True, slots=True)
class Fitted:
    """Rows made to fit what is left of their budgets."""

    scores: torch.Tensor
    """[n, C] log π of the faded distribution, up to a constant."""
    kl: torch.Tensor
    """[n] KL of each row's distribution, nats."""
    fits: torch.Tensor
    """[n] bool; False where even the base model restricted to the support costs more than is left."""
    ends: torch.Tensor
    """[n] bool: the budget is spent after this step."""


def fit_budget(scores: torch.Tensor, base_logprobs: torch.Tensor, left: torch.Tensor, budget: torch.Tensor) -> Fitted:
    """scores: log π up to a constant [n, C]; base_logprobs: log π₀ of the same tokens [n, C], -inf where masked;
    left, budget: [n] nats."""
    absent = base_logprobs.isneginf() | scores.isneginf()
    base = base_logprobs.masked_fill(absent, 0.0)
    direction = scores.masked_fill(absent, 0.0) - base

    def at(strength: torch.Tensor) -> torch.Tensor:
        return (base + strength.unsqueeze(-1) * direction).masked_fill(absent, -torch.inf)

    strength = left / budget
    kl = _support_kl(at(strength), base_logprobs)
    ends = kl > left
    if bool(ends.any()):
        low, high = torch.zeros_like(strength), strength
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            fits = _support_kl(at(middle), base_logprobs) <= left
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        strength = torch.where(ends, low, strength)
        kl = _support_kl(at(strength), base_logprobs)
    return Fitted(at(strength), kl, kl <= left, ends)


def _support_kl(scores: torch.Tensor, base_logprobs: torch.Tensor) -> torch.Tensor:
    logprobs = scores.log_softmax(dim=-1)
    ratio = (logprobs - base_logprobs).masked_fill(logprobs.isneginf(), 0.0)
    return (logprobs.exp() * ratio).sum(dim=-1)
