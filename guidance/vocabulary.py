"""Guidance over the whole vocabulary: policies are blended with the base, and what was done is recorded."""

from collections.abc import Sequence

import torch

from steersman.guidance.gates import choose_seed
from steersman.guidance.kl_budget import fit_budgets
from steersman.guidance.plan import Formula
from steersman.guidance.readings import Readings
from steersman.guidance.report import VocabularyStep
from steersman.guidance.rows import Steered
from steersman.guidance.transfer import to_device
from steersman.kernels.arguments import BlendRows
from steersman.kernels.dispatch import blend_policy, has_kernels
from steersman.kernels.reference import blend_logits


def steer_vocabulary(logits: torch.Tensor, steered: Sequence[Steered], readings: Readings) -> None:
    """Writes Σ c log π of each row up to a constant into `logits` [B, V]; every row's policies have been read."""
    groups: dict[tuple[str, int], list[Steered]] = {}
    rest = []
    for s in steered:
        if has_kernels(logits.device) and _is_single(s):
            samples = 0 if s.gate is None else s.gate.samples
            groups.setdefault((s.formula.policies[0].policy, samples), []).append(s)
        else:
            rest.append(s)
    for (policy, samples), group in groups.items():
        _blend_by_kernel(logits, group, readings, policy, samples)
    if rest:
        _blend(logits, rest, readings)


def _is_single(steered: Steered) -> bool:
    return len(steered.formula.policies) == 1 and steered.row.request.plan.kl_budget is None


def _blend_by_kernel(
    logits: torch.Tensor, steered: Sequence[Steered], readings: Readings, policy: str, samples: int
) -> None:
    """One policy a row; the kernel decides on which side of its gate a row is."""
    index = to_device([s.row.index for s in steered], logits.device)
    base = logits[index]
    asked = BlendRows(
        rows=index.int(),
        threshold=to_device(
            [-torch.inf if s.gate is None else s.gate.threshold for s in steered], logits.device, torch.float32
        ),
        above=to_device([_coefficients(s.formula) for s in steered], logits.device, torch.float32),
        below=to_device([_coefficients(s.row.request.plan.below) for s in steered], logits.device, torch.float32),
        seeds=to_device([choose_seed(s.row) if samples else 0 for s in steered], logits.device),
    )
    said = readings.gather(policy, [s.row for s in steered]).to(logits.device)
    blended = blend_policy(logits, said, asked, samples)
    guided = logits[index]
    totals = base.logsumexp(dim=-1), guided.logsumexp(dim=-1)
    _record(steered, VocabularyStep(base, guided, *totals, blended.opened.bool()))


def _blend(logits: torch.Tensor, steered: Sequence[Steered], readings: Readings) -> None:
    index = find_index(logits, [s.row.index for s in steered])
    base = logits.clone() if index is None else logits[index]
    guided = blend_readings(base, steered, readings)
    base_total = base.logsumexp(dim=-1)
    guided, kept = fit_budgets(steered, guided, base - base_total.unsqueeze(-1))
    guided_total = guided.logsumexp(dim=-1)
    # Where policy and base have no token in common that a grammar allows, the base decodes.
    kept = kept & guided_total.isfinite()
    guided = torch.where(kept.unsqueeze(-1), guided, base)
    if index is None:
        logits.copy_(guided)
    else:
        logits.index_copy_(0, index, guided)
    _record(steered, VocabularyStep(base, guided, base_total, torch.where(kept, guided_total, base_total), kept))


def _record(steered: Sequence[Steered], step: VocabularyStep) -> None:
    for line, s in enumerate(steered):
        s.record(step, line)


def blend_readings(
    base: torch.Tensor, steered: Sequence[Steered], readings: Readings, ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Σ c log π of each row up to a constant, over the vocabulary or the candidates `ids` [G, k]; base is of the same
    shape. A policy that a row does not use has coefficient 0 there."""
    names = list(dict.fromkeys(term.policy for s in steered for term in s.formula.policies))
    table = []
    for s in steered:
        own = {term.policy: term.coefficient for term in s.formula.policies}
        table.append([s.formula.base, *(own.get(name, 0.0) for name in names)])
    answers = []
    for name in names:
        users = [n for n, s in enumerate(steered) if readings.has(name, s.row)]
        logits = readings.gather(name, [steered[n].row for n in users]).to(base.device)
        if len(users) == len(steered):
            answers.append(logits if ids is None else logits.gather(1, ids))
            continue
        places = to_device(users, base.device)
        chosen = logits if ids is None else logits.gather(1, ids[places])
        answers.append(base.new_zeros(base.shape).index_copy_(0, places, chosen))
    return blend_logits(base, answers, to_device(table, base.device, base.dtype))


def find_index(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor | None:
    """The rows' indices, or None when they are all of `logits` in order."""
    return None if list(rows) == list(range(len(logits))) else to_device(rows, logits.device)


def _coefficients(formula: Formula) -> list[float]:
    return [formula.base, formula.policies[0].coefficient if formula.policies else 0.0]
