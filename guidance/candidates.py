"""Guidance by rewards: the base's k best candidates of every row are scored, and nothing else stays possible."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from steersman.guidance.asking import Auxiliaries, Scoring
from steersman.guidance.kl_budget import fit_budgets
from steersman.guidance.persistent_batch import CandidateSteps, HeadStepMemory
from steersman.guidance.plan import Formula
from steersman.guidance.readings import Readings
from steersman.guidance.report import CandidateStep, HeadStep
from steersman.guidance.rows import LastTokens, Steered
from steersman.guidance.transfer import to_device
from steersman.guidance.transforms import Combination, build_combination, explain_broken
from steersman.guidance.vocabulary import blend_readings
from steersman.guidance.work import Failure, Work
from steersman.kernels.arguments import HeadRows
from steersman.kernels.dispatch import (
    can_rerank_by_heads,
    has_kernels,
    launch_heads,
    rerank_by_heads,
    select_candidates,
    tabulate_heads,
    write_reranked,
)
from steersman.kernels.reference import add_rewards, write_candidates


@dataclass(frozen=True, slots=True)
class _Layout:
    """What depends on rows and formulas alone: the same in every step until a row comes or goes."""

    key: list[tuple[int, int]]
    formulas: list[Formula]
    """Held so that the identities in `key` stay theirs."""
    rows: torch.Tensor
    """[G] int64: the rows' places in the logits."""
    whole: bool
    """Whether they are all, in order."""
    k: int
    limits: torch.Tensor | None
    """[G, 1]: candidates of each row; None where each has k."""
    scoring: Scoring
    combination: Combination
    heads: HeadRows | None
    """The rows, where nothing but heads decides."""
    has_policies: bool
    has_budgets: bool
    narrower: list[list[str]]
    """Of each row, its models that have fewer tokens than the base's logits; empty where no row has any."""
    widths: torch.Tensor | None
    """[G, 1]: token ids below it can be read by all models of the row."""


class CandidateSteering:
    """Scores candidates with a runtime's models."""

    def __init__(self, models: Auxiliaries, work: Work) -> None:
        self._models = models
        self._work = work
        self._layout: tuple[tuple[int, int, int], _Layout] | None = None
        self._last: list[Steered] | None = None
        """What the layout was last found for."""
        self._memory = HeadStepMemory()

    def steer(
        self,
        logits: torch.Tensor,
        steered: list[Steered],
        readings: Readings,
        last: LastTokens,
        biased: torch.Tensor | None = None,
    ) -> None:
        """Leaves in each row of `logits` [B, V] its candidates' scores and -inf elsewhere; `biased` is what the
        candidates are chosen by, as in GuidanceRuntime.step."""
        layout = self._find_layout(logits, steered)
        if layout.heads is not None and biased is None and readings.hidden is not None and can_rerank_by_heads(logits):
            if layout.heads.table is None:
                self._steer_by_heads(logits, steered, layout.heads, readings.hidden)
            else:
                self._launch_heads(logits, steered, layout, layout.heads, readings.hidden)
            return
        with self._work.timing("candidates_seconds"):
            ids, values, base_logprobs = _select(logits, layout, biased)
        with self._work.timing("rewards_seconds"):
            rewards = self._models.score([s.row for s in steered], layout.scoring, ids, readings, last)
        with self._work.timing("writing_seconds"):
            # In front of the policies, which give no probability to a token that they do not have either.
            values = self._mask_unreadable(steered, layout, ids, values)
            if layout.has_policies:
                values = blend_readings(values, steered, readings, ids)
            if layout.has_budgets:
                self._write_within_budgets(logits, steered, layout, CandidateStep(ids, base_logprobs, values, rewards))
                return
            scores, broken = write_reranked(logits, layout.rows, ids, values, layout.combination.terms, rewards)
            self._record(steered, CandidateStep(ids, base_logprobs, scores, rewards))
            self._fail_where(steered, broken, values, rewards)

    def find_steps(self, logits: torch.Tensor, steered: list[Steered]) -> CandidateSteps | None:
        """How the rows are guided in steps to come, where heads alone score their candidates, and the kernels are there
        for logits such as these; else None."""
        heads = self._find_layout(logits, steered).heads
        if heads is None or not can_rerank_by_heads(logits):
            return None
        return CandidateSteps(heads, lambda step: self._fail_broken(steered, step))

    def _steer_by_heads(
        self,
        logits: torch.Tensor,
        steered: list[Steered],
        asked: HeadRows,
        hidden: torch.Tensor,
    ) -> None:
        """As the rest, on a CPU, where what became of many steps lies together."""
        with self._work.timing("rewards_seconds"):
            step = self._memory.next_step(asked)
            written = rerank_by_heads(logits, hidden, asked, step.done, step.place)
        self._record(steered, step)
        if not written:
            self._fail_broken(steered, step)

    def _fail_broken(self, steered: Sequence[Steered], step: HeadStep) -> None:
        values = torch.from_numpy(step.done.values[step.place])
        self._fail_where(steered, step.scores[:, 0].isnan(), values, step.rewards)

    def _launch_heads(
        self,
        logits: torch.Tensor,
        steered: list[Steered],
        layout: _Layout,
        asked: HeadRows,
        hidden: torch.Tensor,
    ) -> None:
        """As the rest, on a device with kernels, whose values the host reads when a report or a failure needs them."""
        with self._work.timing("rewards_seconds"):
            done = launch_heads(logits, hidden if layout.whole else hidden[layout.rows], asked)
        self._record(steered, CandidateStep(done.ids, done.logprobs, done.scores, done.rewards))

        def explain(line: int) -> Failure:
            values, logprobs = done.values[line], done.logprobs[line]
            if layout.narrower and bool(values.isneginf().all()) and not bool(logprobs.isneginf().all()):
                return self._explain_unreadable(steered, layout, line)
            return explain_broken(steered[line].formula, values, done.rewards[line])

        self._models.fail_where([s.row for s in steered], done.broken, explain)

    def _write_within_budgets(
        self, logits: torch.Tensor, steered: list[Steered], layout: _Layout, step: CandidateStep
    ) -> None:
        """As the rest, where rows have a KL budget, with which the host waits for the device. step: with the base's
        logits of the candidates in the place of scores."""
        scores = add_rewards(step.scores, layout.combination.combine(step.rewards))
        broken = scores[:, 0].isnan()
        self._fail_where(steered, broken, step.scores, step.rewards)
        scores = fit_budgets(steered, scores, step.base_logprobs)
        self._record(steered, replace(step, scores=scores))
        kept = (~broken).nonzero().squeeze(-1)
        write_candidates(logits, layout.rows[kept], step.ids[kept], scores[kept])

    def _find_layout(self, logits: torch.Tensor, steered: list[Steered]) -> _Layout:
        shape = (*logits.shape, self._models.changes)
        if self._layout is None or self._layout[0] != shape or self._last is not steered:
            key = [(s.row.index, id(s.formula)) for s in steered]
            if self._layout is None or self._layout[0] != shape or self._layout[1].key != key:
                self._layout = (shape, self._make_layout(logits, steered, key))
            self._last = steered
        return self._layout[1]

    def _make_layout(self, logits: torch.Tensor, steered: list[Steered], key: list[tuple[int, int]]) -> _Layout:
        device, vocabulary = logits.device, logits.shape[-1]
        formulas = [s.formula for s in steered]
        k = min(max(formula.top_k for formula in formulas), vocabulary)
        ragged = any(formula.top_k < k for formula in formulas)
        known = self._models.find_narrower(vocabulary)
        narrower = [[name for name in s.row.request.plan.models if name in known] for s in steered] if known else []
        widths = [[min((known[name] for name in names), default=vocabulary)] for names in narrower]
        rows = [s.row.index for s in steered]
        index = to_device(rows, device)
        scoring = self._models.plan_scoring(index, formulas)
        has_policies = any(formula.policies or formula.base != 1.0 for formula in formulas)
        has_budgets = any(s.row.request.plan.kl_budget is not None for s in steered)
        limits = to_device([[formula.top_k] for formula in formulas], device) if ragged else None
        combination = build_combination(formulas, device)
        heads = None
        if not (has_policies or has_budgets):
            heads = self._find_head_rows(HeadRows(index, k, limits, [], combination.terms), scoring, narrower)
        return _Layout(
            key,
            formulas,
            index,
            rows == list(range(len(logits))),
            k,
            limits,
            scoring,
            combination,
            heads,
            has_policies,
            has_budgets,
            narrower if any(narrower) else [],
            to_device(widths, device) if any(narrower) else None,
        )

    def _find_head_rows(self, rows: HeadRows, scoring: Scoring, narrower: list[list[str]]) -> HeadRows | None:
        """The rows with the heads that score them; None where others do, or tokens are masked that they have."""
        heads = self._models.find_heads(scoring)
        if heads is None:
            return None
        if not has_kernels(scoring.device):
            return None if any(narrower) else replace(rows, heads=heads)
        if not {name for names in narrower for name in names} <= {part.model for part in scoring.parts}:
            return None
        return replace(rows, heads=heads, table=to_device(tabulate_heads(heads), scoring.device))

    def _mask_unreadable(
        self, steered: Sequence[Steered], layout: _Layout, ids: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """`values` [G, k] of the candidates `ids` with -inf where one of the row's own models cannot read the
        candidate, which the base's logits may be padded with: such a row has fewer candidates. One that has none left
        fails, and its values are NaN, so that the base decodes it until the host learns of it."""
        if layout.widths is None:
            return values
        before, values = values, values.masked_fill(ids >= layout.widths, -torch.inf)
        empty = values.isneginf().all(dim=-1, keepdim=True) & ~before.isneginf().all(dim=-1, keepdim=True)

        def explain(line: int) -> Failure:
            return self._explain_unreadable(steered, layout, line)

        self._models.fail_where([s.row for s in steered], empty.squeeze(-1), explain)
        return values.masked_fill(empty, torch.nan)

    def _explain_unreadable(self, steered: Sequence[Steered], layout: _Layout, line: int) -> Failure:
        known = {name: self._models.by_name[name].vocabulary or 0 for name in layout.narrower[line]}
        name = min(known, key=known.__getitem__)
        reason = (
            f"none of the base's best {steered[line].formula.top_k} tokens is among the ids 0 to "
            f"{known[name] - 1} that {name!r} reads; raise top_k"
        )
        return Failure(name, "unreadable", reason)

    def _record(self, steered: Sequence[Steered], step: CandidateStep | HeadStep) -> None:
        for line, s in enumerate(steered):
            s.record(step, line)

    def _fail_where(
        self, steered: Sequence[Steered], broken: torch.Tensor, values: torch.Tensor, rewards: torch.Tensor
    ) -> None:
        def explain(line: int) -> Failure:
            return explain_broken(steered[line].formula, values[line], rewards[line])

        self._models.fail_where([s.row for s in steered], broken, explain)


def _select(
    logits: torch.Tensor, layout: _Layout, biased: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, the base's logits and its log-probabilities [G, k] of the candidates, the latter among the tokens that
    are not masked."""
    if biased is None:
        return select_candidates(logits, layout.rows, layout.k, layout.limits, whole=layout.whole)
    ids, chosen, _ = select_candidates(biased, layout.rows, layout.k, layout.limits, whole=layout.whole)
    base, masked = logits[layout.rows], biased[layout.rows].isneginf()
    values = base.gather(1, ids).masked_fill(chosen.isneginf(), -torch.inf)
    return ids, values, values - base.masked_fill(masked, -torch.inf).logsumexp(dim=-1, keepdim=True)
