"""The papers' decoding algorithms, slow and obvious: no cache, one full forward per candidate, float64.

The oracle that the runtime and its adapters are tested against; nothing is ever served through it. It reads requests
as they are written, not as the runtime compiles them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from steersman.guidance.request import (
    BASE,
    Gate,
    KLThresholdGuidance,
    LengthControlGuidance,
    MixedGuidance,
    ProductGuidance,
    Reward,
    RewardGuidance,
    SteeredGuidance,
)

Logits = Callable[[Sequence[int]], torch.Tensor]
"""Tokens → next-token logits [V]."""
Rewards = Callable[[list[list[int]]], torch.Tensor]
"""Several token sequences of one length → the reward of each whole sequence."""


@dataclass(frozen=True)
class ReferenceModels:
    """Everything that is asked."""

    base: Logits
    end_token: int
    rewards: Mapping[str, Rewards] = field(default_factory=dict)
    policies: Mapping[str, Logits] = field(default_factory=dict)


@dataclass(frozen=True)
class ReferenceStep:
    """One position: the distribution and what it was made of, float64."""

    logprobs: torch.Tensor
    """[V] guided log-probabilities log π; -inf outside of the support."""
    base_logprobs: torch.Tensor
    """[V] log π₀."""
    guided: bool = False
    """Whether anything but π₀ was applied."""
    candidates: list[int] = field(default_factory=list)
    """The support, where it is not the whole vocabulary."""
    rewards: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Reward model → reward of each candidate."""
    doubt: float = math.inf
    """Distance of a gate's quantity from its threshold: below float32's precision it is arbitrary."""

    @property
    def margin(self) -> float:
        """By how much the best candidate leads: below the precision of float32 the choice is arbitrary."""
        best = self.logprobs.topk(2).values
        return float(best[0] - best[1])

    @property
    def kl_truncation(self) -> float:
        """−log π₀(support) in nats: what keeping only the support costs."""
        return -float(self.base_logprobs[self.logprobs > -torch.inf].logsumexp(-1))

    @property
    def kl_steering(self) -> float:
        """KL of π from π₀ on the support of π, in nats."""
        return _kl(self.logprobs, self.base_logprobs) - self.kl_truncation


def reference_step(
    tokens: Sequence[int],
    guidance: SteeredGuidance,
    models: ReferenceModels,
    position: int = 0,
    spent: float = 0.0,
) -> ReferenceStep:
    """One position of an answer that has `position` tokens already and has spent so many nats of its budget."""
    base = models.base(tokens).double().log_softmax(-1)
    closed = ReferenceStep(base, base)
    left = math.inf if guidance.kl_budget is None else guidance.kl_budget - spent
    if left <= 1e-6:
        return closed
    is_open, doubt = _gate(guidance, tokens, base, models, position)
    if is_open:
        step = _apply(guidance, tokens, base, models)
    elif isinstance(guidance, KLThresholdGuidance) and guidance.mix != 0:
        policy = models.policies[guidance.policy](tokens).double().log_softmax(-1)
        step = ReferenceStep(mix(base, policy, guidance.mix), base, True)
    else:
        step = closed
    step = _weaken(step, left / 8)
    return replace(step, doubt=min(doubt, step.doubt))


def mix(base: torch.Tensor, policy: torch.Tensor, a: float) -> torch.Tensor:
    """π_mix = softmax(a log(π_dpo / π_ref) + log π_ref) (Shallow Preference Signals, §3.3.1)."""
    return _masked(base, a * (policy - base) + base)


def transform(reward: torch.Tensor, term: Reward) -> torch.Tensor:
    """T(r): the reward, affine, or log σ(r − reference) of Transforming and Combining Rewards."""
    if term.transform == "log_sigmoid":
        return torch.nn.functional.logsigmoid(reward - term.reference)
    return term.scale * reward + term.shift if term.transform == "affine" else reward


def reference_greedy(
    prompt: Sequence[int], guidance: SteeredGuidance, models: ReferenceModels, max_tokens: int
) -> tuple[list[int], list[ReferenceStep]]:
    """The best candidate at every position, until the end token or `max_tokens`."""
    response: list[int] = []
    steps: list[ReferenceStep] = []
    while len(response) < max_tokens and (not response or response[-1] != models.end_token):
        spent = sum(step.kl_steering for step in steps)
        steps.append(reference_step([*prompt, *response], guidance, models, len(response), spent))
        response.append(int(steps[-1].logprobs.argmax()))
    return response, steps


def reference_replay(
    prompt: Sequence[int], response: Sequence[int], guidance: SteeredGuidance, models: ReferenceModels
) -> list[ReferenceStep]:
    """The steps of an answer that somebody else chose."""
    steps: list[ReferenceStep] = []
    for n in range(len(response)):
        spent = sum(step.kl_steering for step in steps)
        steps.append(reference_step([*prompt, *response[:n]], guidance, models, n, spent))
    return steps


def reference_kl(steps: Sequence[ReferenceStep], response: Sequence[int]) -> float:
    """Σ log π − log π₀ of the chosen tokens, nats."""
    return float(sum(s.logprobs[v] - s.base_logprobs[v] for s, v in zip(steps, response, strict=True)))


def _apply(
    guidance: SteeredGuidance, tokens: Sequence[int], base: torch.Tensor, models: ReferenceModels
) -> ReferenceStep:
    def policy(name: str) -> torch.Tensor:
        return base if name == BASE else models.policies[name](tokens).double().log_softmax(-1)

    def product(coefficients: Mapping[str, float]) -> torch.Tensor:
        return torch.stack([c * policy(name) for name, c in coefficients.items() if c]).sum(dim=0)

    if isinstance(guidance, RewardGuidance):
        over = base
        if guidance.policies is not None:
            over = product(guidance.policies)
        return _rerank(guidance, tokens, base, over, models)
    if isinstance(guidance, MixedGuidance):
        return ReferenceStep(mix(base, policy(guidance.policy), guidance.mix), base, guidance.mix != 0)
    if isinstance(guidance, ProductGuidance):
        alone = all(c == (name == BASE) for name, c in guidance.policies.items())
        return ReferenceStep(_masked(base, product(guidance.policies)), base, not alone)
    return ReferenceStep(_masked(base, policy(guidance.policy)), base, True)


def _rerank(
    guidance: RewardGuidance,
    tokens: Sequence[int],
    base: torch.Tensor,
    over: torch.Tensor,
    models: ReferenceModels,
) -> ReferenceStep:
    """PARGS, Algorithm 1: V_k = the k most likely tokens of π₀; log π(v) = log π₀(v) + β Σ w T(r(s·v)) on V_k."""
    candidates = base.topk(min(guidance.top_k or len(base), len(base))).indices.tolist()
    suffix = [models.end_token] if guidance.end_token else []
    texts = [[*tokens, candidate, *suffix] for candidate in candidates]
    raw = {term.model: models.rewards[term.model](texts).double() for term in guidance.terms}
    scores = over[candidates]
    for term in guidance.terms:
        scores = scores + guidance.beta * term.weight * transform(raw[term.model], term)
    logprobs = torch.full_like(base, -torch.inf)
    logprobs[candidates] = scores.masked_fill(base[candidates].isneginf(), -torch.inf).log_softmax(-1)
    return ReferenceStep(logprobs, base, True, candidates, raw)


def _gate(
    guidance: SteeredGuidance, tokens: Sequence[int], base: torch.Tensor, models: ReferenceModels, position: int
) -> tuple[bool, float]:
    """Whether the gate is open, and how close the decision was. The KL is exact, whatever estimator was asked for."""

    def kl(name: str) -> float:
        return _kl(_masked(base, models.policies[name](tokens).double()), base)

    if isinstance(guidance, LengthControlGuidance):
        return position < guidance.length, math.inf
    if isinstance(guidance, KLThresholdGuidance):
        return _above(kl(guidance.policy), guidance.threshold)
    gate: Gate | None = guidance.gate
    if gate is None:
        return True, math.inf
    decisions = []
    if gate.first_tokens is not None:
        decisions.append((position < gate.first_tokens, math.inf))
    if gate.entropy_above is not None:
        decisions.append(_above(-float((base.exp() * base.masked_fill(base.isneginf(), 0)).sum()), gate.entropy_above))
    if gate.kl_above is not None:
        named = list(getattr(guidance, "policies", None) or [getattr(guidance, "policy", "")])
        name = gate.policy or next(name for name in named if name != BASE)
        decisions.append(_above(kl(name), gate.kl_above))
    return all(is_open for is_open, _ in decisions), min(doubt for _, doubt in decisions)


def _above(value: float, threshold: float) -> tuple[bool, float]:
    return value > threshold, abs(value - threshold)


def _weaken(step: ReferenceStep, allowed: float) -> ReferenceStep:
    """π₀^(1−s) π^s on the support with the largest s that costs at most `allowed` nats against π₀ on it."""
    if step.kl_steering <= allowed:
        return step
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        fits = _between(step, middle).kl_steering <= allowed
        low, high = (middle, high) if fits else (low, middle)
    return _between(step, low)


def _between(step: ReferenceStep, strength: float) -> ReferenceStep:
    mixed = (1 - strength) * step.base_logprobs + strength * step.logprobs
    support = step.logprobs > -torch.inf
    return replace(step, logprobs=torch.where(support, mixed, -torch.inf).log_softmax(-1))


def _masked(base: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(base.isneginf(), -torch.inf).log_softmax(-1)


def _kl(logprobs: torch.Tensor, base: torch.Tensor) -> float:
    ratio = (logprobs - base).masked_fill(logprobs.isneginf(), 0.0)
    return float((logprobs.exp() * ratio).sum())
