"""The guidance runtime: requests, and `step()`, the one door that every adapter goes through.

It knows neither vLLM nor HTTP. A step takes the base's next-token logits of a batch, decides where guidance applies,
asks policies and reward models, each in one forward for all rows that need it, and writes the guided logits in place.
Rows that are not guided are not touched.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from steersman.guidance.gates import closed_by_kl, may_open, open_by_entropy
from steersman.guidance.kl_budget import fit_budget
from steersman.guidance.plan import Formula, Plan
from steersman.guidance.policies import Policy
from steersman.guidance.readings import Readings
from steersman.guidance.report import CandidateStep, Report, VocabularyStep, summarise
from steersman.guidance.rewards import RewardModel
from steersman.guidance.rows import GuidedRequest, Row, Steered, begin_positions, choose_last_token
from steersman.guidance.transforms import Combination, build_combination
from steersman.kernels.dispatch import has_kernels, select_candidates, write_reranked
from steersman.kernels.reference import blend_logits, write_candidates

logger = logging.getLogger(__name__)

_KEPT_REQUESTS = 4096
"""Requests that have left the batch and whose report nobody has asked for yet; the oldest are forgotten beyond it."""


@dataclass
class Work:
    """What the runtime has done so far. Seconds are the host's."""

    steps: int = 0
    rows: int = 0
    """Rows whose logits were changed."""
    candidates_seconds: float = 0.0
    """Choosing the candidates."""
    rewards_seconds: float = 0.0
    """Reward models' forwards."""
    policies_seconds: float = 0.0
    """Policies' forwards."""
    writing_seconds: float = 0.0
    """Deciding, combining and writing guided logits."""

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Adds the duration of the context to a stage's seconds."""
        began = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + time.perf_counter() - began)


class GuidanceRuntime:
    """Guides any number of requests at once, each by its own plan."""

    def __init__(
        self,
        reward_models: Mapping[str, RewardModel],
        eos_token_id: int | None,
        policies: Mapping[str, Policy] | None = None,
    ) -> None:
        self.reward_models = dict(reward_models)
        self.policies = dict(policies or {})
        self.eos_token_id = eos_token_id
        self.work = Work()
        self._requests: OrderedDict[Hashable, GuidedRequest] = OrderedDict()
        self._combination: tuple[list[Formula], Combination] | None = None

    def start(self, key: Hashable, plan: Plan, prompt_length: int, seed: int = 0) -> GuidedRequest:
        """Begins a request, or takes up one that was paused under the same key."""
        request = self._requests.get(key)
        if request is None:
            request = self._requests[key] = GuidedRequest(key, plan, prompt_length, seed)
            self._forget_oldest()
        return request

    def pause(self, key: Hashable, tokens: Sequence[int] | None = None, failed: bool = False) -> None:
        """Frees the request's cache, keeping its record: it has left the batch, for good or for a while."""
        for reward_model in self.reward_models.values():
            reward_model.release(key, tokens, failed)
        for policy in self.policies.values():
            policy.release(key, tokens, failed)

    def finish(self, key: Hashable, response: Sequence[int]) -> Report | None:
        """Frees everything the request holds and reports on the `response` tokens; None if the key is unknown."""
        self.pause(key)
        request = self._requests.pop(key, None)
        if request is None:
            return None
        request.finished = True
        choose_last_token(request, response)
        spent = None if request.plan.kl_budget is None else sum(request.spent)
        return summarise(request.plan, request.positions, request.counts, response, spent, request.error)

    @torch.inference_mode()
    def step(self, logits: torch.Tensor, rows: Sequence[Row]) -> None:
        """Writes guided logits into `logits` [B, V] float32 for `rows`; every other row keeps its bits.

        Scoring a position again is harmless. A row that cannot be scored fails alone: its request is marked, and the
        end token is forced so that it stops soon.
        """
        live = [row for row in rows if row.request.error is None and not row.request.finished]
        if live:
            self._guide(logits, live)
        for row in rows:
            if row.request.error is not None:
                self._force_end(logits[row.index])

    def _guide(self, logits: torch.Tensor, rows: list[Row]) -> None:
        with self.work.timing("writing_seconds"):
            begin_positions(rows)
        readings = Readings(logits.shape[-1])
        steered = self._decide(logits, rows, readings)
        by_rewards = [s for s in steered if s.formula.rewards]
        by_policies = [s for s in steered if not s.formula.rewards]
        if by_rewards:
            self._steer_candidates(logits, by_rewards, readings)
        if by_policies:
            with self.work.timing("writing_seconds"):
                self._steer_vocabulary(logits, by_policies, readings)
        self.work.steps += 1
        self.work.rows += len(steered)

    def _decide(self, logits: torch.Tensor, rows: list[Row], readings: Readings) -> list[Steered]:
        """Which formula applies to which row. Nothing is asked of a model behind a gate that closes without it."""
        if all(row.request.plan.always_open and not row.request.plan.policies for row in rows):
            return [Steered(row, row.request.plan.formula) for row in rows]
        with self.work.timing("writing_seconds"):
            opened = open_by_entropy(logits, [row for row in rows if may_open(row)])
        gated = [row for row in opened if row.request.plan.gate.kl is not None]
        ungated = [row for row in opened if row.request.plan.gate.kl is None]
        wanted = [(row.request.plan.gate.kl.policy, row) for row in gated if row.request.plan.gate.kl is not None]
        self._read(readings, wanted + [(t.policy, row) for row in ungated for t in row.request.plan.formula.policies])
        with self.work.timing("writing_seconds"):
            closed = closed_by_kl(logits, [row for row in gated if row.request.error is None], readings)
        steered = [
            Steered(row, row.request.plan.below if row.index in closed else row.request.plan.formula) for row in opened
        ]
        self._read(readings, [(term.policy, s.row) for s in steered for term in s.formula.policies])
        steered = [s for s in steered if not s.formula.is_base and s.row.request.error is None]
        self._count_savings(rows, steered, readings)
        return steered

    def _read(self, readings: Readings, wanted: Sequence[tuple[str, Row]]) -> None:
        """One forward for each policy that has not been read for its rows yet."""
        groups: dict[str, list[Row]] = {}
        for name, row in wanted:
            if row.request.error is None and not readings.has(name, row):
                groups.setdefault(name, []).append(row)
        with self.work.timing("policies_seconds"):
            for name, rows in groups.items():
                self._read_policy(readings, name, rows)

    def _read_policy(self, readings: Readings, name: str, rows: list[Row]) -> None:
        def read(part: list[int]) -> tuple[torch.Tensor, list[int]]:
            return self.policies[name].read([rows[g].prefix for g in part])

        answers, caught_up = self._ask(f"policy {name!r}", rows, read)
        broken = ~(answers < torch.inf).all(dim=-1)
        for row, bad in zip(rows, broken.tolist(), strict=True):
            if bad:
                self._fail(row, f"policy {name!r} returned logits that are not finite numbers")
        good = [g for g, row in enumerate(rows) if row.request.error is None]
        if good:
            readings.add(name, [rows[g] for g in good], answers if len(good) == len(rows) else answers[good])
        for row, read_before in zip(rows, caught_up, strict=True):
            request = row.request
            request.policy_tokens += read_before + 1
            request.saved_policy_tokens = max(0, request.saved_policy_tokens - row.caught_up(read_before))

    def _steer_candidates(self, logits: torch.Tensor, steered: list[Steered], readings: Readings) -> None:
        rows, formulas = [s.row for s in steered], [s.formula for s in steered]
        with self.work.timing("candidates_seconds"):
            index = _index(logits, rows)
            base = logits if index is None else logits[index]
            k = min(max(formula.top_k for formula in formulas), base.shape[-1])
            limits = None
            if any(formula.top_k < k for formula in formulas):
                limits = torch.tensor([[formula.top_k] for formula in formulas], device=logits.device)
            ids, values, base_logprobs = select_candidates(base, k, limits)
        with self.work.timing("rewards_seconds"):
            rewards = self._score(rows, formulas, ids)
        with self.work.timing("writing_seconds"):
            if any(formula.policies or formula.base != 1.0 for formula in formulas):
                values = _blend(values, steered, readings, ids)
            combination = self._find_combination(formulas, rewards.device)
            budgeted = any(row.request.plan.kl_budget is not None for row in rows)
            by_kernel = has_kernels(logits.device) and not budgeted
            if by_kernel:
                every = torch.tensor([row.index for row in rows], device=logits.device)
                scores = write_reranked(logits, every, ids, values, combination.terms, rewards)
                failed = scores.isnan().any(dim=-1)
                kept = ~failed
            else:
                scores = torch.where(values.isneginf(), values, values + combination.combine(rewards))
                failed = scores.isnan().any(dim=-1) | scores.isposinf().any(dim=-1)
                scores, kept = self._fit_budgets(steered, scores, base_logprobs, ~failed)
            step = CandidateStep(ids, base_logprobs, scores, rewards)
            for line, (s, bad, written) in enumerate(zip(steered, failed.tolist(), kept.tolist(), strict=True)):
                if bad:
                    names = [t.model for m, t in enumerate(s.formula.rewards) if not _finite(rewards[line, m])]
                    self._fail(
                        s.row,
                        f"reward model {', '.join(map(repr, names))} returned a reward that is not a finite number",
                    )
                elif written:
                    s.position.step, s.position.line, s.position.formula = step, line, s.formula
            if by_kernel:
                return
            if not bool(kept.all()):
                index = torch.tensor([row.index for row in rows], device=logits.device)[kept]
                ids, scores = ids[kept], scores[kept]
            write_candidates(logits, index, ids, scores)

    def _steer_vocabulary(self, logits: torch.Tensor, steered: list[Steered], readings: Readings) -> None:
        rows = [s.row for s in steered]
        index = _index(logits, rows)
        base = logits.clone() if index is None else logits[index]
        guided = _blend(base, steered, readings)
        base_total = base.logsumexp(dim=-1)
        healthy = torch.ones_like(base_total, dtype=torch.bool)
        guided, kept = self._fit_budgets(steered, guided, base - base_total.unsqueeze(-1), healthy)
        guided_total = guided.logsumexp(dim=-1)
        # Where policy and base have no token in common that a grammar allows, the base decodes.
        kept = kept & guided_total.isfinite()
        step = VocabularyStep(base, guided, base_total, guided_total)
        for line, (s, good) in enumerate(zip(steered, kept.tolist(), strict=True)):
            if good:
                s.position.step, s.position.line, s.position.formula = step, line, s.formula
        if bool(kept.all()):
            kept_index, kept_logits = index, guided
        else:
            kept_index, kept_logits = torch.tensor([r.index for r in rows], device=logits.device)[kept], guided[kept]
        if kept_index is None:
            logits.copy_(kept_logits)
        else:
            logits.index_copy_(0, kept_index, kept_logits)

    def _fit_budgets(
        self, steered: list[Steered], scores: torch.Tensor, base_logprobs: torch.Tensor, healthy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weakens the rows with budgets; returns scores and the rows that are written at all."""
        lines = [n for n, s in enumerate(steered) if s.row.request.plan.kl_budget is not None and bool(healthy[n])]
        if not lines:
            return scores, healthy
        requests = [steered[n].row.request for n in lines]
        left = torch.tensor([request.budget_left for request in requests], device=scores.device)
        fitted = fit_budget(scores[lines], base_logprobs[lines], left)
        scores, healthy = scores.clone(), healthy.clone()
        scores[lines], healthy[lines] = fitted.scores, fitted.fits
        for request, kl in zip(requests, fitted.kl.tolist(), strict=True):
            request.spent[-1] = kl
        return scores, healthy

    def _find_combination(self, formulas: list[Formula], device: torch.device) -> Combination:
        if self._combination is None or self._combination[0] != formulas:
            self._combination = (formulas, build_combination(formulas, device))
        return self._combination[1]

    def _score(self, rows: list[Row], formulas: list[Formula], ids: torch.Tensor) -> torch.Tensor:
        """Rewards [G, terms, k] float32 of every row's terms, NaN where there is none or it could not be scored."""
        terms = max(len(formula.rewards) for formula in formulas)
        groups: dict[tuple[str, bool], list[tuple[int, int]]] = {}
        for g, formula in enumerate(formulas):
            for m, term in enumerate(formula.rewards):
                groups.setdefault((term.model, formula.end_token), []).append((g, m))
        rewards = None
        for (name, end_token), places in groups.items():
            lines = [g for g, _ in places]
            candidates = ids if len(lines) == len(ids) else ids[lines]
            tokens = [formulas[g].tokens_per_step for g in lines]
            scored = self._score_with(name, [rows[g] for g in lines], candidates, end_token, tokens)
            if terms == 1 and len(places) == len(rows):
                return scored.unsqueeze(1)
            if rewards is None:
                rewards = scored.new_full((len(rows), terms, ids.shape[1]), torch.nan)
            rewards[lines, [m for _, m in places]] = scored
        assert rewards is not None
        return rewards

    def _score_with(
        self, name: str, rows: list[Row], candidates: torch.Tensor, end_token: bool, step_tokens: list[int]
    ) -> torch.Tensor:
        model, end = self.reward_models[name], self.eos_token_id if end_token else None

        def score(part: list[int]) -> tuple[torch.Tensor, list[int]]:
            chosen = candidates if len(part) == len(rows) else candidates[part]
            return model.score([rows[g].prefix for g in part], chosen, end)

        scored, read = self._ask(f"reward model {name!r}", rows, score, candidates.shape[1])
        for row, read_before, tokens in zip(rows, read, step_tokens, strict=True):
            request = row.request
            request.reward_model_tokens += read_before + (tokens if model.kind == "causal" else 0)
            if model.kind == "causal":
                saved = request.saved_reward_model_tokens - row.caught_up(read_before)
                request.saved_reward_model_tokens = max(0, saved)
        return scored.to(candidates.device)

    def _ask(
        self,
        label: str,
        rows: list[Row],
        ask: Callable[[list[int]], tuple[torch.Tensor, list[int]]],
        width: int = 1,
    ) -> tuple[torch.Tensor, list[int]]:
        """Asks a model for all rows at once; where one of them spoils it, one by one, so that the others go on."""
        try:
            return ask(list(range(len(rows))))
        except Exception as error:
            if len(rows) == 1:
                self._fail(rows[0], f"{label} could not read the answer: {error}")
                return torch.full((1, width), torch.nan), [0]
        answers, read = [], []
        for g, row in enumerate(rows):
            answer, tokens = self._ask(label, [row], lambda _, g=g: ask([g]), width)  # type: ignore[misc]
            answers.append(answer)
            read += tokens
        widest = max(answer.shape[-1] for answer in answers)
        whole = [a if a.shape[-1] == widest else a.new_full((1, widest), torch.nan) for a in answers]
        return torch.cat([a.to(answers[0].device) for a in whole]), read

    def _count_savings(self, rows: list[Row], steered: list[Steered], readings: Readings) -> None:
        scored = {s.row.index for s in steered if s.formula.rewards}
        for row in rows:
            request, plan = row.request, row.request.plan
            request.saved_policy_tokens += sum(not readings.has(name, row) for name in plan.policies)
            if row.index not in scored:
                causal = sum(self.reward_models[name].kind == "causal" for name in plan.reward_models)
                request.saved_reward_model_tokens += causal * plan.formula.tokens_per_step

    def _fail(self, row: Row, reason: str) -> None:
        if row.request.error is None:
            row.request.error = reason
            logger.warning("a guided request failed: %s", reason)
        self.pause(row.request.key, failed=True)

    def _force_end(self, row: torch.Tensor) -> None:
        # Never against a grammar: where the end token is masked, the base's own distribution stays.
        if self.eos_token_id is not None and row[self.eos_token_id] > -torch.inf:
            row.fill_(-torch.inf)
            row[self.eos_token_id] = 0.0

    def _forget_oldest(self) -> None:
        while len(self._requests) > _KEPT_REQUESTS:
            key, _ = self._requests.popitem(last=False)
            self.pause(key)


def _index(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor | None:
    """The rows' indices, or None when they are all of the batch in order."""
    if len(rows) == len(logits) and all(row.index == n for n, row in enumerate(rows)):
        return None
    return torch.tensor([row.index for row in rows], device=logits.device)


def _blend(
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
        if ids is not None:
            logits = logits.gather(1, ids[users])
        if len(users) < len(steered):
            whole = base.new_zeros(base.shape)
            whole[users] = logits
            logits = whole
        answers.append(logits)
    return blend_logits(base, answers, torch.tensor(table, dtype=base.dtype, device=base.device))


def _finite(values: torch.Tensor) -> bool:
    return bool(values.isfinite().all())
