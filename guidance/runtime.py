"""The guidance runtime: requests, and `step()`, the one door that every adapter goes through.

It knows neither vLLM nor HTTP. A step takes the base's next-token logits of a batch, scores the candidates of every
guided row, and writes the guided logits in place. Rows that are not guided are not touched.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from steersman.guidance.plan import Plan
from steersman.guidance.report import Report, StepRecord, summarise
from steersman.guidance.rewards import Prefix, RewardModel
from steersman.guidance.transforms import Combination, build_combination
from steersman.kernels.reference import select_candidates, write_candidates

logger = logging.getLogger(__name__)

_KEPT_REQUESTS = 4096
"""Requests that have left the batch and whose report nobody has asked for yet; the oldest are forgotten beyond it."""


@dataclass
class GuidedRequest:
    """One choice of one request while it is decoded."""

    key: Hashable
    plan: Plan
    prompt_length: int
    records: list[tuple[StepRecord, int]] = field(default_factory=list)
    """For each generated position the step that scored it and this request's row there."""
    reward_model_tokens: int = 0
    error: str | None = None
    finished: bool = False
    """Reported on and released; a row that is still in the batch for a moment is no longer guided."""


@dataclass
class Work:
    """What the runtime has done so far. Seconds are the host's."""

    steps: int = 0
    rows: int = 0
    candidates_seconds: float = 0.0
    """Choosing the candidates."""
    rewards_seconds: float = 0.0
    """Reward models' forwards."""
    writing_seconds: float = 0.0
    """Combining the rewards and writing guided logits."""


@dataclass(slots=True)
class Row:
    """A row of the batch's logits and the request behind it; `prompt` and `output` may be live lists."""

    index: int
    request: GuidedRequest
    prompt: Sequence[int]
    output: Sequence[int]


class GuidanceRuntime:
    """Guides any number of requests at once, each by its own plan, in one forward per reward model and step."""

    def __init__(self, reward_models: Mapping[str, RewardModel], eos_token_id: int | None) -> None:
        self.reward_models = dict(reward_models)
        self.eos_token_id = eos_token_id
        self.work = Work()
        self._requests: OrderedDict[Hashable, GuidedRequest] = OrderedDict()
        self._combination: tuple[list[Plan], Combination] | None = None

    def start(self, key: Hashable, plan: Plan, prompt_length: int) -> GuidedRequest:
        """Begins a request, or takes up one that was paused under the same key."""
        request = self._requests.get(key)
        if request is None:
            request = self._requests[key] = GuidedRequest(key, plan, prompt_length)
            self._forget_oldest()
        return request

    def pause(self, key: Hashable, tokens: Sequence[int] | None = None, failed: bool = False) -> None:
        """Frees the request's cache, keeping its record: it has left the batch, for good or for a while."""
        for model in self.reward_models.values():
            model.release(key, tokens, failed)

    def finish(self, key: Hashable, response: Sequence[int]) -> Report | None:
        """Frees everything the request holds and reports on the `response` tokens; None if the key is unknown."""
        self.pause(key)
        request = self._requests.pop(key, None)
        return (
            None
            if request is None
            else summarise(request.plan, request.records, request.reward_model_tokens, response, request.error)
        )

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
        began = time.perf_counter()
        plans = [row.request.plan for row in rows]
        everything = len(rows) == len(logits) and all(row.index == n for n, row in enumerate(rows))
        index = None if everything else torch.tensor([row.index for row in rows], device=logits.device)
        base = logits if index is None else logits[index]
        vocabulary = base.shape[-1]
        k = min(max(plan.top_k for plan in plans), vocabulary)
        limits = None
        if any(plan.top_k < k for plan in plans):
            limits = torch.tensor([[plan.top_k] for plan in plans], device=logits.device)
        ids, values, base_logprobs = select_candidates(base, k, limits)
        chosen = time.perf_counter()
        rewards = self._score(rows, plans, ids)
        scored = time.perf_counter()
        bonus = self._combine(plans, rewards)
        scores = torch.where(values.isneginf(), values, values + bonus)
        failed = scores.isnan().any(dim=-1) | scores.isposinf().any(dim=-1)
        self._record(rows, StepRecord(ids, base_logprobs, bonus, rewards), failed.tolist())
        if bool(failed.any()):
            good = ~failed
            index = torch.tensor([row.index for row in rows], device=logits.device)[good]
            ids, scores = ids[good], scores[good]
        write_candidates(logits, index, ids, scores)
        self.work.steps += 1
        self.work.rows += len(plans)
        self.work.candidates_seconds += chosen - began
        self.work.rewards_seconds += scored - chosen
        self.work.writing_seconds += time.perf_counter() - scored

    def _record(self, rows: list[Row], record: StepRecord, failed: list[bool]) -> None:
        for g, (row, bad) in enumerate(zip(rows, failed, strict=True)):
            if bad:
                self._fail(row.request, record.rewards[g])
                continue
            # A position that is scored again replaces what was recorded for it.
            position = len(row.prompt) + len(row.output) - row.request.prompt_length
            del row.request.records[position:]
            row.request.records.append((record, g))

    def _combine(self, plans: list[Plan], rewards: torch.Tensor) -> torch.Tensor:
        if self._combination is None or self._combination[0] != plans:
            self._combination = (plans, build_combination(plans, rewards.device))
        return self._combination[1].combine(rewards)

    def _score(self, rows: list[Row], plans: list[Plan], ids: torch.Tensor) -> torch.Tensor:
        """Rewards [G, terms, k] float32 of every row's terms, NaN where there is none or it could not be scored."""
        terms = max(len(plan.rewards) for plan in plans)
        groups: dict[tuple[str, bool], list[tuple[int, int]]] = {}
        for g, plan in enumerate(plans):
            for m, term in enumerate(plan.rewards):
                groups.setdefault((term.model, plan.end_token), []).append((g, m))
        rewards = None
        for (name, end_token), places in groups.items():
            scored = self._score_with(self.reward_models[name], [rows[g] for g, _ in places], ids, end_token, places)
            if terms == 1 and len(places) == len(rows):
                return scored.unsqueeze(1)
            if rewards is None:
                rewards = scored.new_full((len(rows), terms, ids.shape[1]), torch.nan)
            rewards[[g for g, _ in places], [m for _, m in places]] = scored
        assert rewards is not None
        return rewards

    def _score_with(
        self, model: RewardModel, rows: list[Row], ids: torch.Tensor, end_token: bool, places: list[tuple[int, int]]
    ) -> torch.Tensor:
        candidates = ids if len(places) == len(ids) else ids[[g for g, _ in places]]
        prefixes = [Prefix(row.request.key, row.prompt, row.output) for row in rows]
        end = self.eos_token_id if end_token else None
        try:
            scored, read = model.score(prefixes, candidates, end)
        except Exception as error:
            if len(rows) == 1:
                logger.warning("a guided request failed: %s", error)
                rows[0].request.error = f"reward model {model.name!r} could not score the answer: {error}"
                self.pause(rows[0].request.key, failed=True)
                return torch.full(candidates.shape, torch.nan, device=ids.device)
            # One row spoils the batch: score them one by one to find it, so that the others go on.
            parts = [
                self._score_with(model, [row], candidates[g : g + 1], end_token, [(0, 0)]) for g, row in enumerate(rows)
            ]
            return torch.cat(parts)
        for row, prefix_tokens in zip(rows, read, strict=True):
            step_tokens = row.request.plan.tokens_per_step if model.kind == "causal" else 0
            row.request.reward_model_tokens += prefix_tokens + step_tokens
        return scored.to(ids.device)

    def _fail(self, request: GuidedRequest, rewards: torch.Tensor) -> None:
        if request.error is None:
            names = [t.model for m, t in enumerate(request.plan.rewards) if not bool(rewards[m].isfinite().all())]
            request.error = f"reward model {', '.join(map(repr, names))} returned a reward that is not a finite number"
            logger.warning("a guided request failed: %s", request.error)
        self.pause(request.key, failed=True)

    def _force_end(self, row: torch.Tensor) -> None:
        # Never against a grammar: where the end token is masked, the base's own distribution stays.
        if self.eos_token_id is not None and row[self.eos_token_id] > -torch.inf:
            row.fill_(-torch.inf)
            row[self.eos_token_id] = 0.0

    def _forget_oldest(self) -> None:
        while len(self._requests) > _KEPT_REQUESTS:
            key, _ = self._requests.popitem(last=False)
            self.pause(key)
