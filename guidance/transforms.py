"""Reward transforms and their combination over a batch whose rows ask for different ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from steersman.guidance.plan import Formula, Transform
from steersman.guidance.transfer import to_device
from steersman.guidance.work import Failure
from steersman.kernels.arguments import RewardTerms


@dataclass(frozen=True)
class Combination:
    """The reward terms of a batch of formulas as tensors [rows, terms, 1]; rows with fewer terms carry weight 0."""

    strength: torch.Tensor
    """β · weight, float32."""
    scale: torch.Tensor
    shift: torch.Tensor
    log_sigmoid: torch.Tensor | None
    """Where the transform is log-sigmoid, bool; None when it is nowhere."""
    present: torch.Tensor | None
    """Where a row has a term at all, bool; None when every row has every term."""
    plain: bool
    """Every transform is the identity."""

    @cached_property
    def terms(self) -> RewardTerms:
        """The same as a kernel takes them."""
        squashed = torch.zeros_like(self.strength) if self.log_sigmoid is None else self.log_sigmoid
        strength, scale, shift = (t.squeeze(-1) for t in (self.strength, self.scale, self.shift))
        return RewardTerms(strength, scale, shift, squashed.squeeze(-1).int())

    def combine(self, rewards: torch.Tensor) -> torch.Tensor:
        """β Σ_m w_m T_m(r_m) up to a constant for rewards [rows, terms, k] float32; returns [rows, k]. NaN in, NaN
        out."""
        values = rewards
        if not self.plain:
            values = self.scale * rewards + self.shift
            if self.log_sigmoid is not None:
                values = torch.where(self.log_sigmoid, F.logsigmoid(values), values)
        values = self.strength * values
        if self.present is not None:
            values = torch.where(self.present, values, 0.0)
        return values[:, 0] if values.shape[1] == 1 else values.sum(dim=1)


def build_combination(formulas: Sequence[Formula], device: torch.device) -> Combination:
    """Stacks the formulas' terms. Shapes [len(formulas), most terms, 1]."""
    most = max(len(formula.rewards) for formula in formulas)

    def stack(values: Sequence[Sequence[float]], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        padded = [[*row, *[0] * (most - len(row))] for row in values]
        return to_device(padded, device, dtype).unsqueeze(-1)

    terms = [formula.rewards for formula in formulas]
    is_log_sigmoid = [[term.transform is Transform.LOG_SIGMOID for term in row] for row in terms]
    ragged = any(len(row) < most for row in terms)
    return Combination(
        strength=stack([[formula.beta * term.weight for term in formula.rewards] for formula in formulas]),
        scale=stack([[term.scale for term in row] for row in terms]),
        # The same for every candidate, so it cancels, and a large one would only take float32's precision away.
        shift=stack([[0.0 if t.transform is Transform.AFFINE else t.shift for t in row] for row in terms]),
        log_sigmoid=stack(is_log_sigmoid, torch.bool) if any(map(any, is_log_sigmoid)) else None,
        present=stack([[True] * len(row) for row in terms], torch.bool) if ragged else None,
        plain=all(t.scale == 1 and t.transform is Transform.AFFINE for row in terms for t in row),
    )


def explain_broken(formula: Formula, values: torch.Tensor, rewards: torch.Tensor) -> Failure:
    """Why a row with the logits `values` [k] of its support and `rewards` [terms, k] has no scores."""
    there = ~values.isneginf()
    if not there.any():
        policies = [term.policy for term in formula.policies]
        where = f"one of the policies {', '.join(map(repr, policies))}" if policies else "the base itself"
        reason = f"each of the base's best {formula.top_k} tokens has probability 0 under {where}"
        return Failure((policies or [formula.rewards[0].model])[0], "raised", reason)
    scored = rewards[:, there]
    names = [term.model for term, own in zip(formula.rewards, scored, strict=False) if not own.isfinite().all()]
    if names:
        reason = f"reward model {', '.join(map(repr, names))} returned a reward that is not a finite number"
        return Failure(names[0], "not_finite", reason)
    term, largest = max(zip(formula.rewards, scored.abs().amax(dim=1).tolist(), strict=False), key=lambda pair: pair[1])
    reason = (
        f"beta {formula.beta:g} times the weighted rewards is too large for float32: reward model {term.model!r} "
        f"returned {largest:.3g}; lower beta, or the weight or scale of that term"
    )
    return Failure(term.model, "not_finite", reason)
