"""A checked request compiled to numbers: what the runtime needs to know of it, and nothing else. Imports no torch."""

from dataclasses import dataclass
from enum import IntEnum

from steersman.guidance.request import Guidance, Reward


class Transform(IntEnum):
    """How a raw reward enters the formula."""

    AFFINE = 0
    LOG_SIGMOID = 1


@dataclass(frozen=True, slots=True)
class RewardTerm:
    """weight · T(r): affine T(r) = scale·r + shift, or log-sigmoid T(r) = log σ(r − reference)."""

    model: str
    weight: float
    transform: Transform
    scale: float
    shift: float


@dataclass(frozen=True, slots=True)
class Plan:
    """log π(v) = log π₀(v) + beta · Σ terms, v in the base's top_k; with end_token rewards are read after v·<eos>."""

    method: str
    beta: float
    top_k: int
    end_token: bool
    rewards: tuple[RewardTerm, ...]

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one causal reward model reads for one generated token."""
        return 1 + self.top_k * (2 if self.end_token else 1)


def compile_plan(guidance: Guidance) -> Plan:
    """Resolves the shorthand fields of a checked request."""
    return Plan(
        method=guidance.method,
        beta=guidance.beta,
        top_k=guidance.top_k,
        end_token=guidance.end_token,
        rewards=tuple(_compile_term(term) for term in guidance.terms),
    )


def _compile_term(term: Reward) -> RewardTerm:
    if term.transform == "log_sigmoid":
        return RewardTerm(term.model, term.weight, Transform.LOG_SIGMOID, 1.0, -term.reference)
    return RewardTerm(term.model, term.weight, Transform.AFFINE, term.scale, term.shift)
