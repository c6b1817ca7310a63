"""Where guidance applies: conditions on the position, the budget, the base's entropy and a policy's KL."""

import hashlib
from collections.abc import Sequence

import torch

from steersman.guidance.plan import KLCondition, Plan
from steersman.guidance.readings import Readings
from steersman.guidance.rows import Row
from steersman.guidance.transfer import to_device
from steersman.kernels.arguments import LARGEST_SAMPLE
from steersman.kernels.reference import measure_entropy, measure_kl, sample_kl

_SPENT = 1e-6
"""Nats; less is no room for anything."""


def may_open(row: Row) -> bool:
    """What is known without any model: position and budget."""
    plan = row.request.plan
    limit = plan.gate.first_tokens
    if plan.formula.is_base and plan.below.is_base:
        return False
    return (limit is None or row.position < limit) and (plan.kl_budget is None or row.request.budget_left > _SPENT)


def certain_readers(plan: Plan) -> tuple[str, ...]:
    """Models that an open position asks whatever the base's logits are: not those behind its entropy or a KL."""
    if plan.gate.entropy_above is not None:
        return ()
    if plan.gate.kl is not None:
        return (plan.gate.kl.policy,)
    return (*(term.policy for term in plan.formula.policies), *(term.model for term in plan.formula.rewards))


def can_defer(plan: Plan) -> bool:
    """Whether a kernel can decide the KL condition where it writes: no model is spared by knowing it before."""
    if plan.gate.kl is None or plan.kl_budget is not None or plan.gate.kl.samples > LARGEST_SAMPLE:
        return False
    return not plan.formula.rewards and set(plan.policies) == {plan.gate.kl.policy}


def open_by_entropy(logits: torch.Tensor, rows: Sequence[Row]) -> list[Row]:
    """The rows without an entropy condition and those whose condition holds; logits [B, V] are the base's."""
    asked = [row for row in rows if row.request.plan.gate.entropy_above is not None]
    if not asked:
        return list(rows)
    entropies = measure_entropy(logits[to_device([row.index for row in asked], logits.device)]).tolist()
    closed = {
        row.index
        for row, entropy in zip(asked, entropies, strict=True)
        if entropy <= (row.request.plan.gate.entropy_above or 0.0)
    }
    return [row for row in rows if row.index not in closed]


def closed_by_kl(logits: torch.Tensor, rows: Sequence[Row], readings: Readings) -> set[int]:
    """Indices of the rows whose KL condition does not hold; each row's policy has been read."""
    groups: dict[tuple[str, int], list[tuple[Row, KLCondition]]] = {}
    for row in rows:
        condition = row.request.plan.gate.kl
        if condition is not None:
            groups.setdefault((condition.policy, condition.samples), []).append((row, condition))
    closed = set()
    for (policy, samples), group in groups.items():
        members = [row for row, _ in group]
        base, asked = logits[to_device([row.index for row in members], logits.device)], readings.gather(policy, members)
        if samples:
            values = sample_kl(
                asked, base, samples, [torch.Generator(base.device).manual_seed(choose_seed(row)) for row in members]
            )
        else:
            values = measure_kl(asked, base)
        for (row, condition), value in zip(group, values.tolist(), strict=True):
            if not value > condition.threshold:
                closed.add(row.index)
    return closed


def choose_seed(row: Row) -> int:
    """Of a position's samples, 63 bits. Depends on the request's seed and the position alone: not on the batch, nor on
    how often it was asked."""
    digest = hashlib.blake2b(f"{row.request.seed}/{row.position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
