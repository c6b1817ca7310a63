"""A bound on how far guidance may take one answer from the base model: Σ KL(π_t‖π₀_t) over its positions never exceeds
a budget. π₀ is the base on the support of π: what keeping only the top k costs is there also without guidance.

The KL of a position is known before its token is drawn, so the sum is kept below the budget on every path, not only in
the mean; by the chain rule its expectation is the KL between the distributions of whole answers.

No position may take more than an eighth of what is left. One that would take more decodes π₀^(1−s)·π^s, for rewards β
shrunk to s·β, with the largest s that keeps to its share: of all distributions with that KL, the one of most reward.
What is left shrinks by an eighth at most, so guidance never runs dry and no length has to be guessed; a strength that
would over-optimise is cut down at every position alike, and one that needs less is left alone.
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
    """[n] KL of each row's distribution from the base's on the same support, nats."""


def fit_budgets(steered: Sequence[Steered], scores: torch.Tensor, base_logprobs: torch.Tensor) -> torch.Tensor:
    """`scores` [G, C] with those rows weakened that have a budget; counts what they spend. base_logprobs: as in
    `fit_budget`.

    What is left of a budget is the host's: with one in the batch it waits for the device. A row of NaN spends nothing
    and stays as it is.
    """
    lines = [n for n, s in enumerate(steered) if s.row.request.plan.kl_budget is not None]
    if not lines:
        return scores
    requests = [steered[n].row.request for n in lines]
    places = to_device(lines, scores.device)
    left = to_device([request.budget_left for request in requests], scores.device, scores.dtype)
    fitted = fit_budget(scores[places], base_logprobs[places], left)
    for request, kl in zip(requests, fitted.kl.nan_to_num(0.0).tolist(), strict=True):
        request.spent[-1] = kl
    return scores.index_copy(0, places, fitted.scores)


def fit_budget(scores: torch.Tensor, base_logprobs: torch.Tensor, left: torch.Tensor) -> Fitted:
    """scores: log π up to a constant [n, C]; base_logprobs: log π₀ of the same tokens up to a constant [n, C], -inf
    where masked; left: [n] nats."""
    absent = base_logprobs.isneginf() | scores.isneginf()
    base_logprobs = base_logprobs.masked_fill(absent, -torch.inf).log_softmax(dim=-1)
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
    return Fitted(at(strength), kl)


def _support_kl(scores: torch.Tensor, base_logprobs: torch.Tensor) -> torch.Tensor:
    logprobs = scores.log_softmax(dim=-1)
    ratio = (logprobs - base_logprobs).masked_fill(logprobs.isneginf(), 0.0)
    return (logprobs.exp() * ratio).sum(dim=-1)
