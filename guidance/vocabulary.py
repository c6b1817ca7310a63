"""Guidance over the whole vocabulary: policies are blended with the base, rewards that a model returns for every token
are added, and what was done is recorded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from steersman.guidance.gates import choose_seed
from steersman.guidance.head_models import HeadModel
from steersman.guidance.kl_budget import fit_budgets
from steersman.guidance.persistent_batch import MixtureSteps
from steersman.guidance.plan import Formula
from steersman.guidance.readings import Readings
from steersman.guidance.report import VocabularyStep
from steersman.guidance.rows import Row, Steered
from steersman.guidance.transfer import take_rows, to_device
from steersman.guidance.transforms import build_combination, explain_broken
from steersman.guidance.work import Failure
from steersman.kernels.arguments import BlendedRows, BlendRows, MixRows
from steersman.kernels.dispatch import blend_on_cpu, blend_policy, can_blend_on_cpu, has_kernels
from steersman.kernels.reference import add_rewards, blend_logits, find_peaks

_FailWhere = Callable[[Sequence[Row], torch.Tensor, Callable[[int], Failure]], None]


@dataclass(frozen=True, slots=True)
class _Mixture:
    """Rows that one policy is mixed into, and nothing else; the same in every step until one comes or goes."""

    policy: str
    rows: list[Row]
    index: torch.Tensor
    """[G] int64: the rows' places in the logits."""
    coefficients: torch.Tensor
    """[G, 2] float32: of log base and log policy."""


class VocabularySteering:
    """Writes Σ c log π + β Σ w T(r) of each row up to a constant."""

    def __init__(self, fail_where: _FailWhere) -> None:
        """fail_where: as Auxiliaries.fail_where."""
        self._fail_where = fail_where
        self._last: tuple[Sequence[Steered], _Mixture | None] = ((), None)
        """Rows, and the mixture that they are."""

    def steer(
        self,
        logits: torch.Tensor,
        steered: Sequence[Steered],
        readings: Readings,
        biased: torch.Tensor | None = None,
    ) -> None:
        """Writes rows of `logits` [B, V]; every row's policies and rewards have been read.

        biased: [B, V], -inf where a client has masked a token, as in GuidanceRuntime.step. What is recorded are the
        models' own distributions, without masks.
        """
        if biased is None and can_blend_on_cpu(logits) and (mixture := self._find_mixture(logits, steered)) is not None:
            _mix_on_cpu(logits, steered, mixture, readings)
            return
        groups: dict[tuple[str, int], list[Steered]] = {}
        rest = []
        for s in steered:
            if has_kernels(logits.device) and _is_single(s):
                samples = 0 if s.gate is None else s.gate.samples
                groups.setdefault((s.formula.policies[0].policy, samples), []).append(s)
            else:
                rest.append(s)
        for (policy, samples), group in groups.items():
            _blend_by_kernel(logits, group, readings, policy, samples, biased)
        for with_rewards in (False, True):
            part = [s for s in rest if bool(s.formula.rewards) is with_rewards]
            if part:
                _blend(logits, part, readings, self._fail_where, biased)

    def find_steps(
        self, logits: torch.Tensor, steered: Sequence[Steered], heads: Mapping[str, HeadModel]
    ) -> MixtureSteps | None:
        """How the rows are guided in steps to come, where one policy head of all `heads` is mixed into them and nothing
        is traced, and the kernels are there for logits such as these; else None."""
        mixture = self._find_mixture(logits, steered) if can_blend_on_cpu(logits) else None
        model = None if mixture is None else heads.get(mixture.policy)
        if mixture is None or model is None or any(row.request.plan.trace for row in mixture.rows):
            return None
        if not model.adds_base or model.vocabulary != logits.shape[1] or model.head.device != logits.device:
            return None
        asked = MixRows(mixture.index, mixture.coefficients, model.head.weights)
        return MixtureSteps(asked, logits.shape[1])

    def _find_mixture(self, logits: torch.Tensor, steered: Sequence[Steered]) -> _Mixture | None:
        """The mixture that the rows are, if they are one; looked for once while they stay."""
        if self._last[0] is not steered:
            self._last = (steered, _make_mixture(steered, logits.device))
        return self._last[1]


def _mix_on_cpu(logits: torch.Tensor, steered: Sequence[Steered], mixture: _Mixture, readings: Readings) -> None:
    head = readings.find_head(mixture.policy, mixture.rows, logits.device)
    # A head with fewer tokens than the base's logits has none of the others, which `gather` sees to.
    is_change = head is not None and head[0].vocabulary == logits.shape[1]
    if head is not None and is_change:
        outputs = head[0].every(head[1])
    else:
        outputs = readings.gather(mixture.policy, mixture.rows).to(logits).contiguous()
    done = blend_on_cpu(logits, mixture.index, outputs, mixture.coefficients, is_change=is_change)
    totals = (done.base_total, done.guided_total)
    _record(steered, VocabularyStep(done.base, done.guided, *totals, done.changed, done.kept))


def _make_mixture(steered: Sequence[Steered], device: torch.device) -> _Mixture | None:
    policies = {term.policy for s in steered for term in s.formula.policies}
    if len(policies) != 1 or not all(_is_single(s) and s.gate is None for s in steered):
        return None
    return _Mixture(
        policies.pop(),
        [s.row for s in steered],
        to_device([s.row.index for s in steered], device),
        to_device([_coefficients(s.formula) for s in steered], device, torch.float32),
    )


def _is_single(steered: Steered) -> bool:
    formula = steered.formula
    return len(formula.policies) == 1 and not formula.rewards and steered.row.request.plan.kl_budget is None


def _blend_by_kernel(
    logits: torch.Tensor,
    steered: Sequence[Steered],
    readings: Readings,
    policy: str,
    samples: int,
    biased: torch.Tensor | None,
) -> None:
    """One policy a row; the kernel decides on which side of its gate a row is."""
    rows = [s.row for s in steered]
    index = to_device([row.index for row in rows], logits.device)
    asked = BlendRows(
        rows=index.int(),
        threshold=to_device(
            [-torch.inf if s.gate is None else s.gate.threshold for s in steered], logits.device, torch.float32
        ),
        above=to_device([_coefficients(s.formula) for s in steered], logits.device, torch.float32),
        below=to_device([_coefficients(s.row.request.plan.below) for s in steered], logits.device, torch.float32),
        seeds=to_device([choose_seed(s.row) if samples else 0 for s in steered], logits.device),
    )
    head = readings.find_head(policy, rows, logits.device)
    if head is None:
        done = _blend_outputs(logits, index, readings.gather(policy, rows).to(logits.device), asked, samples)
    else:
        layer, features = head
        done = layer.blend(logits, features, asked, samples, any(s.gate is not None for s in steered))
    totals = (done.base_total, done.guided_total)
    _record(steered, VocabularyStep(done.base, done.guided, *totals, done.changed, done.opened.bool()))
    if biased is not None:
        shown = done.guided.masked_fill(biased[index].isneginf(), -torch.inf)
        logits.index_copy_(0, index, torch.where(_is_possible(shown), shown, done.base))


def _blend_outputs(
    logits: torch.Tensor, index: torch.Tensor, policy: torch.Tensor, asked: BlendRows, samples: int
) -> BlendedRows:
    """Blends logits [G, V] of a policy into the rows `index` [G]."""
    base = logits[index]
    blended = blend_policy(logits, policy, asked, samples)
    guided = logits[index]
    (base_total, base_best), (guided_total, guided_best) = find_peaks(base), find_peaks(guided)
    outcome = (blended.kl, blended.estimate, blended.opened)
    return BlendedRows(*outcome, base, guided, base_total, guided_total, base_best != guided_best)


def _blend(
    logits: torch.Tensor,
    steered: Sequence[Steered],
    readings: Readings,
    fail_where: _FailWhere,
    biased: torch.Tensor | None,
) -> None:
    index = find_index(logits, [s.row.index for s in steered])
    base = logits.clone() if index is None else logits[index]
    guided = blend_readings(base, steered, readings)
    rewards = _gather_rewards(steered, readings, base) if steered[0].formula.rewards else None
    if rewards is not None:
        guided = _add_rewards(guided, steered, rewards, fail_where)
    guided = fit_budgets(steered, guided, base)
    (base_total, base_best), (guided_total, guided_best) = find_peaks(base), find_peaks(guided)
    shown, kept = guided, guided_total.isfinite()
    if biased is not None:
        masked = (biased if index is None else biased[index]).isneginf()
        shown = guided.masked_fill(masked, -torch.inf)
        kept = _is_possible(shown).squeeze(-1)
    if has_kernels(logits.device) or not bool(kept.all()):
        # Where policy and base have no token in common that a grammar allows, the base decodes.
        guided, shown = (torch.where(kept.unsqueeze(-1), own, base) for own in (guided, shown))
        guided_total, guided_best = (
            torch.where(kept, guided_total, base_total),
            torch.where(kept, guided_best, base_best),
        )
    if index is None:
        logits.copy_(shown)
    else:
        logits.index_copy_(0, index, shown)
    changed = base_best != guided_best
    _record(steered, VocabularyStep(base, guided, base_total, guided_total, changed, kept, rewards))


def _add_rewards(
    blended: torch.Tensor, steered: Sequence[Steered], rewards: torch.Tensor, fail_where: _FailWhere
) -> torch.Tensor:
    # A token that a reward model does not have is none of the support.
    values = blended.masked_fill(rewards.isneginf().any(dim=1), -torch.inf)
    guided = add_rewards(values, build_combination([s.formula for s in steered], values.device).combine(rewards))
    broken = guided.isnan().any(dim=-1) & (values > -torch.inf).any(dim=-1)
    fail_where(
        [s.row for s in steered],
        broken,
        lambda line: explain_broken(steered[line].formula, values[line], rewards[line]),
    )
    return guided


def _gather_rewards(steered: Sequence[Steered], readings: Readings, base: torch.Tensor) -> torch.Tensor:
    """Rewards [G, terms, V] of every row's terms for every token; 0 where a row has no such term."""
    groups: dict[tuple[int, str], list[int]] = {}
    for line, s in enumerate(steered):
        for number, term in enumerate(s.formula.rewards):
            groups.setdefault((number, term.model), []).append(line)
    terms = 1 + max(number for number, _ in groups)
    rewards = base.new_zeros(len(steered), terms, base.shape[-1])
    for (number, model), lines in groups.items():
        values = readings.gather(model, [steered[line].row for line in lines]).to(rewards)
        rewards[:, number].index_copy_(0, to_device(lines, base.device), values)
    return rewards


def _is_possible(logits: torch.Tensor) -> torch.Tensor:
    """Whether any token of a row [G, V] has a finite logit, and none is NaN or infinite: [G, 1] bool."""
    return logits.logsumexp(dim=-1, keepdim=True).isfinite()


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
        rows = [steered[n].row for n in users]
        if ids is None:
            logits = readings.gather(name, rows).to(base.device)
        else:
            logits = readings.gather_at(name, rows, take_rows(ids, users)).to(base.device)
        if len(users) < len(steered):
            logits = base.new_zeros(base.shape).index_copy_(0, to_device(users, base.device), logits)
        answers.append(logits)
    return blend_logits(base, answers, to_device(table, base.device, base.dtype))


def find_index(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor | None:
    """The rows' indices, or None when they are all of `logits` in order."""
    return None if list(rows) == list(range(len(logits))) else to_device(rows, logits.device)


def _coefficients(formula: Formula) -> list[float]:
    return [formula.base, formula.policies[0].coefficient if formula.policies else 0.0]
