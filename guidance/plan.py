"""A checked request compiled to numbers: what the runtime needs to know of it, and nothing else. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from steersman.guidance import request
from steersman.guidance.request import (
    BASE,
    KLThresholdGuidance,
    LengthControlGuidance,
    MixedGuidance,
    ProductGuidance,
    Reward,
    RewardGuidance,
    SteeredGuidance,
)


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
class PolicyTerm:
    """coefficient · log π_policy."""

    policy: str
    coefficient: float


@dataclass(frozen=True)
class Formula:
    """log π(v) = base · log π₀(v) + Σ policies + beta · Σ rewards + const.

    With rewards v is one of the base's top_k, or any token where top_k is 0, as without rewards; with end_token rewards
    are read after v·<eos>.
    """

    base: float = 1.0
    policies: tuple[PolicyTerm, ...] = ()
    rewards: tuple[RewardTerm, ...] = ()
    beta: float = 0.0
    top_k: int = 0
    end_token: bool = False

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one causal reward model reads for one generated token."""
        return 1 + self.top_k * (2 if self.end_token else 1)

    @property
    def has_candidates(self) -> bool:
        """Whether the support is the base's top k, and not the whole vocabulary."""
        return bool(self.rewards) and self.top_k > 0

    @property
    def is_base(self) -> bool:
        """Whether this is π₀ itself."""
        return self.base == 1.0 and not self.policies and not self.rewards


@dataclass(frozen=True, slots=True)
class KLCondition:
    """KL(policy‖base) > threshold nats at this position; found from `samples` draws of the policy, exactly if 0."""

    policy: str
    threshold: float
    samples: int


@dataclass(frozen=True, slots=True)
class Gate:
    """Where a formula applies: all conditions that are not None hold."""

    first_tokens: int | None = None
    entropy_above: float | None = None
    kl: KLCondition | None = None


@dataclass(frozen=True)
class Plan:
    """`formula` where the gate is open, `below` where it is closed, π₀ once `kl_budget` nats are spent."""

    method: str
    formula: Formula
    below: Formula
    gate: Gate
    kl_budget: float | None
    trace: bool

    @cached_property
    def reward_models(self) -> tuple[str, ...]:
        """Names of all reward models that may be asked."""
        return tuple(term.model for term in self.formula.rewards)

    @cached_property
    def policies(self) -> tuple[str, ...]:
        """Names of all policies that may be asked, the base not among them."""
        names = [term.policy for formula in (self.formula, self.below) for term in formula.policies]
        if self.gate.kl is not None:
            names.append(self.gate.kl.policy)
        return tuple(dict.fromkeys(names))

    @cached_property
    def models(self) -> tuple[str, ...]:
        """Names of all auxiliary models that may be asked."""
        return (*self.reward_models, *self.policies)

    @cached_property
    def always_open(self) -> bool:
        """Whether the formula applies everywhere, whatever happens."""
        return self.gate == Gate() and self.kl_budget is None and not self.formula.is_base


def compile_plan(guidance: SteeredGuidance) -> Plan:
    """Resolves a checked request to terms and gate."""
    below = Formula()
    if isinstance(guidance, RewardGuidance):
        formula = _reward_formula(guidance)
    elif isinstance(guidance, MixedGuidance):
        formula = _mixture(guidance.policy, guidance.mix)
    elif isinstance(guidance, ProductGuidance):
        formula = _product(guidance.policies)
    else:
        formula = _mixture(guidance.policy, 1.0)
        if isinstance(guidance, KLThresholdGuidance):
            below = _mixture(guidance.policy, guidance.mix)
    return Plan(guidance.method, formula, below, _compile_gate(guidance), guidance.kl_budget, guidance.trace)


def _reward_formula(guidance: RewardGuidance) -> Formula:
    over = _product(guidance.policies) if guidance.policies is not None else Formula()
    return Formula(
        base=over.base,
        policies=over.policies,
        rewards=tuple(_compile_term(term) for term in guidance.terms),
        beta=guidance.beta,
        top_k=guidance.top_k or 0,
        end_token=guidance.end_token,
    )


def _mixture(policy: str, mix: float) -> Formula:
    return _product({BASE: 1.0 - mix, policy: mix})


def _product(coefficients: Mapping[str, float]) -> Formula:
    """A policy with coefficient 0 is not asked at all."""
    terms = tuple(PolicyTerm(name, c) for name, c in coefficients.items() if name != BASE and c != 0.0)
    return Formula(base=coefficients.get(BASE, 0.0), policies=terms)


def _compile_gate(guidance: SteeredGuidance) -> Gate:
    if isinstance(guidance, LengthControlGuidance):
        return Gate(first_tokens=guidance.length)
    if isinstance(guidance, KLThresholdGuidance):
        samples = guidance.samples if guidance.estimator == "monte_carlo" else 0
        return Gate(kl=KLCondition(guidance.policy, guidance.threshold, samples))
    gate = guidance.gate
    if gate is None:
        return Gate()
    condition = None
    if gate.kl_above is not None:
        name = gate.policy or next(name for _, name in request.policies(guidance))
        condition = KLCondition(name, gate.kl_above, gate.samples if gate.estimator == "monte_carlo" else 0)
    return Gate(gate.first_tokens, gate.entropy_above, condition)


def _compile_term(term: Reward) -> RewardTerm:
    if term.transform == "log_sigmoid":
        return RewardTerm(term.model, term.weight, Transform.LOG_SIGMOID, 1.0, -term.reference)
    return RewardTerm(term.model, term.weight, Transform.AFFINE, term.scale, term.shift)
