"""The papers' decoding algorithms, slow and obvious: no cache, one full forward per candidate, float64.

The oracle that the runtime and its adapters are tested against; nothing is ever served through it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from steersman.guidance.plan import Plan, RewardTerm, Transform

Logits = Callable[[Sequence[int]], torch.Tensor]
"""Tokens → next-token logits [V]."""
Rewards = Callable[[list[list[int]]], torch.Tensor]
"""Several token sequences of one length → the reward of each whole sequence."""


@dataclass(frozen=True)
class ReferenceStep:
    """One position: the distribution and what it was made of, float64."""

    candidates: list[int]
    logprobs: torch.Tensor
    """[V] guided log-probabilities log π; -inf outside of the support."""
    base_logprobs: torch.Tensor
    """[V] log π₀."""
    rewards: dict[str, torch.Tensor]
    """Reward model → reward of each candidate."""

    @property
    def margin(self) -> float:
        """By how much the best candidate leads: below the precision of float32 the choice is arbitrary."""
        best = self.logprobs.topk(2).values
        return float(best[0] - best[1])


def reference_step(
    tokens: Sequence[int], plan: Plan, base: Logits, rewards: dict[str, Rewards], end_token: int
) -> ReferenceStep:
    """PARGS, Algorithm 1: V_k = the k most likely tokens of π₀; log π(v) = log π₀(v) + β Σ w T(r(s·v)) on V_k."""
    base_logprobs = base(tokens).double().log_softmax(-1)
    candidates = base_logprobs.topk(min(plan.top_k, len(base_logprobs))).indices.tolist()
    suffix = [end_token] if plan.end_token else []
    texts = [[*tokens, candidate, *suffix] for candidate in candidates]
    raw = {term.model: rewards[term.model](texts).double() for term in plan.rewards}
    scores = base_logprobs[candidates]
    for term in plan.rewards:
        scores = scores + plan.beta * term.weight * transform(raw[term.model], term)
    logprobs = torch.full_like(base_logprobs, -torch.inf)
    logprobs[candidates] = scores.log_softmax(-1)
    return ReferenceStep(candidates, logprobs, base_logprobs, raw)


def transform(reward: torch.Tensor, term: RewardTerm) -> torch.Tensor:
    """T(r): affine, or log σ(r − reference) of Transforming and Combining Rewards."""
    value = term.scale * reward + term.shift
    return torch.nn.functional.logsigmoid(value) if term.transform is Transform.LOG_SIGMOID else value


def reference_greedy(
    prompt: Sequence[int],
    plan: Plan,
    base: Logits,
    rewards: dict[str, Rewards],
    end_token: int,
    max_tokens: int,
) -> tuple[list[int], list[ReferenceStep]]:
    """PARGS-G: the best candidate at every position, until the end token or `max_tokens`."""
    response: list[int] = []
    steps: list[ReferenceStep] = []
    while len(response) < max_tokens and (not response or response[-1] != end_token):
        step = reference_step([*prompt, *response], plan, base, rewards, end_token)
        steps.append(step)
        response.append(int(step.logprobs.argmax()))
    return response, steps


def reference_kl(steps: Sequence[ReferenceStep], response: Sequence[int]) -> float:
    """Σ log π − log π₀ of the chosen tokens, nats."""
    return float(sum(s.logprobs[v] - s.base_logprobs[v] for s, v in zip(steps, response, strict=True)))
