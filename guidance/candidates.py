"""Guidance by rewards: the base's k best candidates of every row are scored, and nothing else stays possible."""

from collections.abc import Sequence

import torch

from steersman.guidance.asking import Auxiliaries
from steersman.guidance.kl_budget import fit_budgets
from steersman.guidance.plan import Formula
from steersman.guidance.readings import Readings
from steersman.guidance.report import CandidateStep
from steersman.guidance.rows import LastTokens, Steered
from steersman.guidance.transfer import to_device
from steersman.guidance.transforms import Combination, build_combination, explain_broken
from steersman.guidance.vocabulary import blend_readings, find_index
from steersman.guidance.work import Failure, Work
from steersman.kernels.dispatch import has_kernels, select_candidates, write_reranked
from steersman.kernels.reference import add_rewards, write_candidates


class CandidateSteering:
    """Scores candidates with a runtime's models; keeps the reward terms of the last batch, which the next one often
    shares."""

    def __init__(self, models: Auxiliaries, work: Work) -> None:
        self._models = models
        self._work = work
        self._combination: tuple[list[Formula], Combination] | None = None

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
        formulas = [s.formula for s in steered]
        with self._work.timing("candidates_seconds"):
            index = find_index(logits, [s.row.index for s in steered])
            base = logits if index is None else logits[index]
            chosen_by = biased if biased is None or index is None else biased[index]
            ids, values, base_logprobs = self._select(base, formulas, chosen_by)
        with self._work.timing("rewards_seconds"):
            rewards = self._models.score([s.row for s in steered], formulas, ids, readings, last)
        with self._work.timing("writing_seconds"):
            if any(formula.policies or formula.base != 1.0 for formula in formulas):
                values = blend_readings(values, steered, readings, ids)
            values = self._mask_unreadable(steered, ids, values, logits.shape[-1])
            combination = self._find_combination(formulas, rewards.device)
            if has_kernels(logits.device) and all(s.row.request.plan.kl_budget is None for s in steered):
                every = to_device([s.row.index for s in steered], logits.device)
                scores = write_reranked(logits, every, ids, values, combination.terms, rewards)
                self._record(steered, CandidateStep(ids, base_logprobs, scores, rewards), [True] * len(steered))
                self._fail_where(steered, scores.isnan().any(dim=-1), values, rewards)
                return
            scores = add_rewards(values, combination.combine(rewards))
            broken = scores.isnan().any(dim=-1)
            self._fail_where(steered, broken, values, rewards)
            scores = fit_budgets(steered, scores, base_logprobs)
            kept = (~broken).tolist()
            self._record(steered, CandidateStep(ids, base_logprobs, scores, rewards), kept)
            if not all(kept):
                lines = to_device([line for line, good in enumerate(kept) if good], ids.device, torch.long)
                index = to_device([s.row.index for s in steered], logits.device)[lines]
                ids, scores = ids[lines], scores[lines]
            write_candidates(logits, index, ids, scores)

    def _select(
        self, base: torch.Tensor, formulas: Sequence[Formula], biased: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, the base's logits and its log-probabilities [G, k] of the candidates, the latter among the tokens that
        are not masked."""
        k = min(max(formula.top_k for formula in formulas), base.shape[-1])
        limits = None
        if any(formula.top_k < k for formula in formulas):
            limits = to_device([[formula.top_k] for formula in formulas], base.device)
        if biased is None:
            return select_candidates(base, k, limits)
        ids, chosen, _ = select_candidates(biased, k, limits)
        values = base.gather(1, ids).masked_fill(chosen.isneginf(), -torch.inf)
        allowed = base.masked_fill(biased.isneginf(), -torch.inf)
        return ids, values, values - allowed.logsumexp(dim=-1, keepdim=True)

    def _mask_unreadable(
        self, steered: Sequence[Steered], ids: torch.Tensor, values: torch.Tensor, vocabulary: int
    ) -> torch.Tensor:
        """`values` [G, k] of the candidates `ids` with -inf where one of the row's own models cannot read the
        candidate, which the base's logits may be padded with: such a row has fewer candidates. One that has none left
        fails, and its values are NaN, so that the base decodes it until the host learns of it."""
        narrower = self._models.find_narrower(vocabulary)
        named = [[name for name in s.row.request.plan.models if name in narrower] for s in steered] if narrower else []
        if not any(named):
            return values
        limits = [[min((narrower[name] for name in names), default=vocabulary)] for names in named]
        limit = to_device(limits, ids.device)
        values = values.masked_fill(ids >= limit, -torch.inf)
        empty = values.isneginf().all(dim=-1, keepdim=True) & (limit < vocabulary)

        def explain(line: int) -> Failure:
            name = min(named[line], key=narrower.__getitem__)
            reason = (
                f"none of the base's best {steered[line].formula.top_k} tokens is among the ids 0 to "
                f"{narrower[name] - 1} that {name!r} reads; raise top_k"
            )
            return Failure(name, "raised", reason)

        self._models.fail_where([s.row for s in steered], empty.squeeze(-1), explain)
        return values.masked_fill(empty, torch.nan)

    def _find_combination(self, formulas: list[Formula], device: torch.device) -> Combination:
        if self._combination is None or self._combination[0] != formulas:
            self._combination = (formulas, build_combination(formulas, device))
        return self._combination[1]

    def _record(self, steered: Sequence[Steered], step: CandidateStep, kept: Sequence[bool]) -> None:
        for line, (s, good) in enumerate(zip(steered, kept, strict=True)):
            if good:
                s.record(step, line)

    def _fail_where(
        self, steered: Sequence[Steered], broken: torch.Tensor, values: torch.Tensor, rewards: torch.Tensor
    ) -> None:
        def explain(line: int) -> Failure:
            return explain_broken(steered[line].formula, values[line], rewards[line])

        self._models.fail_where([s.row for s in steered], broken, explain)
