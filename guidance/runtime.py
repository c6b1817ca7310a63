"""The guidance runtime: requests, and `step()`, the one door that every adapter goes through.

It knows neither vLLM nor HTTP. A step takes the base's next-token logits of a batch, decides where guidance applies,
asks policies and reward models, each in one forward for all rows that need it, and writes the guided logits in place.
Rows that are not guided are not touched.

On a GPU a step asks the device for nothing, so that the host can prepare the next one meanwhile: what went wrong is
learned a step late, and until then the base decodes the row. What waits for the device: gates that spare a model
(entropy, or KL in front of rewards), a KL budget, a trace, and catching up.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from steersman.guidance.asking import AnyPolicy, AnyReward, Auxiliaries
from steersman.guidance.candidates import CandidateSteering
from steersman.guidance.gates import can_defer, closed_by_kl, may_open, open_by_entropy
from steersman.guidance.hidden_states import HiddenStateStore
from steersman.guidance.overlap import SameStream, SideStream
from steersman.guidance.persistent_batch import PersistentBatch, Steps
from steersman.guidance.plan import Plan
from steersman.guidance.readings import Readings
from steersman.guidance.report import Report, summarise
from steersman.guidance.rows import (
    GuidedRequest,
    LastTokens,
    Row,
    Steered,
    begin_positions,
    choose_draft_tokens,
    choose_known_tokens,
    place_draft,
)
from steersman.guidance.text_form import Source
from steersman.guidance.transfer import HostCopy, LateReads, copy_to_host, take_rows, to_device
from steersman.guidance.vocabulary import VocabularySteering
from steersman.guidance.work import Work
from steersman.kernels.dispatch import can_blend_on_cpu, has_kernels

_KEPT_REQUESTS = 4096
"""Requests that have left the batch and whose report nobody has asked for yet; the oldest are forgotten beyond it."""


@dataclass(frozen=True, slots=True)
class _Split:
    """Rows by what their formulas' support is."""

    by_candidates: list[Steered]
    over_vocabulary: list[Steered]

    def without_failed(self) -> "_Split":
        """The rows whose guidance has not ended."""
        return _split([s for s in (*self.by_candidates, *self.over_vocabulary) if s.row.request.error is None])


def _split(steered: list[Steered]) -> _Split:
    return _Split(
        [s for s in steered if s.formula.has_candidates], [s for s in steered if not s.formula.has_candidates]
    )


@dataclass(frozen=True, slots=True)
class _Batch:
    """The rows of a step, and what holds for them in every step until one comes, goes, fails or finishes."""

    rows: Sequence[Row]
    changes: int
    """`Auxiliaries.changes` when the rows were looked at: with another number this no longer holds."""
    live: list[Row]
    failed: list[int]
    """Indices of the rows whose guidance has ended."""
    steered: _Split | None
    """The formulas, where they depend on nothing that a step brings."""
    policies: dict[str, list[Row]]
    """Rows by the policies that these formulas have."""

    @classmethod
    def of(cls, rows: Sequence[Row], changes: int) -> "_Batch":
        """The batch of `rows`; changes: `Auxiliaries.changes` as it is."""
        live = [row for row in rows if row.request.error is None and not row.request.finished]
        failed = [row.index for row in rows if row.request.error is not None]
        if not all(row.request.plan.always_open for row in live):
            return cls(rows, changes, live, failed, None, {})
        steered = [Steered(row, row.request.plan.formula) for row in live]
        policies: dict[str, list[Row]] = {}
        for s in steered:
            for name in dict.fromkeys(term.policy for term in s.formula.policies):
                policies.setdefault(name, []).append(s.row)
        return cls(rows, changes, live, failed, _split(steered), policies)


class GuidanceRuntime:
    """Guides any number of requests at once, each by its own plan."""

    def __init__(
        self,
        reward_models: Mapping[str, AnyReward],
        eos_token_id: int | None,
        policies: Mapping[str, AnyPolicy] | None = None,
        side: SideStream | None = None,
        copy: Callable[[torch.Tensor], HostCopy] = copy_to_host,
    ) -> None:
        """side: where models that do not need the base's logits are read ahead of a step. copy: how values of the
        device come to the host."""
        self._side = side or SameStream()
        self._late = LateReads(self._side.join, copy)
        self.work = Work()
        self.models = Auxiliaries(reward_models, policies or {}, eos_token_id, self._late, self.work)
        self.eos_token_id = eos_token_id
        self._candidates = CandidateSteering(self.models, self.work)
        self._vocabulary = VocabularySteering(self.models.fail_where)
        self._requests: OrderedDict[Hashable, GuidedRequest] = OrderedDict()
        self._batch: _Batch | None = None
        self._last_batch: _Batch | None = None
        """That of the last step, as it was behind it."""
        self._persistent: PersistentBatch | None = None
        """The rows of `_batch`, where heads alone guide them."""
        self.hidden_states = HiddenStateStore()
        """The base's, of texts that heads score or are proven with."""

    def turn(self) -> AbstractContextManager[None]:
        """Entered around whatever runs a model; a server watches it."""
        return nullcontext()

    def measured_step(self) -> AbstractContextManager[None]:
        """Entered around each step; a server measures it."""
        return nullcontext()

    @property
    def reward_models(self) -> dict[str, AnyReward]:
        """By name."""
        return self.models.reward_models

    @property
    def policies(self) -> dict[str, AnyPolicy]:
        """By name."""
        return self.models.policies

    def add(self, model: AnyReward | AnyPolicy) -> None:
        """Requests that start from now on may name the model."""
        self.models.add(model)

    def remove(self, name: str) -> AnyReward | AnyPolicy:
        """Takes out a model that no live request uses; the caller holds the last of it. A request that named it, and
        is still known for a moment, is guided no more."""
        self.settle(wait=True)
        self._flush_records()
        for request in self._requests.values():
            if request.error is None and name in request.plan.models:
                request.error, request.fault = f"{name!r} was unloaded", "raised"
        return self.models.remove(name)

    def start(
        self, key: Hashable, plan: Plan, prompt_length: int, seed: int = 0, source: Source | None = None
    ) -> GuidedRequest:
        """Begins a request, or takes up one that was paused under the same key. source: what its prompt was made of,
        for reward models that read text; without it they read the decoded prompt."""
        request = self._requests.get(key)
        if request is None:
            request = self._requests[key] = GuidedRequest(key, plan, prompt_length, seed, source)
            self._forget_oldest()
        return request

    def pause(self, key: Hashable, tokens: Sequence[int] | None = None) -> None:
        """Frees the request's cache, keeping its record: it has left the batch, for good or for a while. With `tokens`
        later requests that begin alike may reuse it."""
        self.settle()
        self._flush_records()
        self.models.release(key, tokens)

    def finish(self, key: Hashable, response: Sequence[int]) -> Report | None:
        """Frees everything the request holds and reports on the `response` tokens; None if the key is unknown."""
        with self.turn():
            self.settle(wait=True)
            self._flush_records()
            self.models.release(key)
            request = self._requests.pop(key, None)
            if request is None:
                return None
            request.finished = True
            if self._batch is not None and any(row.request is request for row in self._batch.rows):
                self.models.changes += 1
            choose_known_tokens(request, response)
            spent = None if request.plan.kl_budget is None else sum(request.spent)
            return summarise(
                *(request.plan, request.positions, request.counts, response, spent, request.error, request.fault)
            )

    def score_text(
        self,
        name: str,
        prompt: Sequence[int],
        response: Sequence[int],
        start: int = 0,
        source: Source | None = None,
    ) -> list[float]:
        """A reward model's value after each token of `response` from index `start` on."""
        with self.turn():
            self.settle()
            rewards = self.models.scorers[name].score_text(prompt, response, start, source)
            self.work.count("score", name, len(prompt) + len(response))
            return rewards

    def score_answers(
        self, name: str, prompt: Sequence[int], responses: Sequence[Sequence[int]], source: Source | None = None
    ) -> tuple[list[float], int]:
        """A reward model's value at the end of each response, and the tokens that it read for all of them."""
        with self.turn():
            self.settle()
            rewards, read = self.models.scorers[name].score_answers(prompt, responses, source)
            self.work.count("score", name, read)
            return rewards, read

    def settle(self, wait: bool = False) -> None:
        """Before caches change hands: puts what comes after behind all work that was read ahead, and uses the values
        that have arrived; with `wait` all that were read."""
        self._late.settle(wait)

    def read_late(self, tensor: torch.Tensor, use: Callable[[list[Any]], None]) -> None:
        """Calls `use` with a device tensor's values once they have arrived, behind all work that was read ahead."""
        self._late.read(tensor, use)

    @torch.inference_mode()
    def read_ahead(self, rows: Sequence[Row], fed: Callable[[], torch.Tensor]) -> None:
        """Begins, beside the base's forward, what the next step will need of `rows` whatever the base says.

        fed: gives the rows' last tokens, [len(rows)] int64 on the device. A row whose step does not come is no harm.
        """
        with self.turn():
            groups = self.models.plan_ahead(rows)
            if groups:
                with self._side.fork():
                    self.models.read_ahead(groups, LastTokens(rows, fed))

    @torch.inference_mode()
    def choose_draft_tokens(self, rows: Sequence[Row], tokens: torch.Tensor) -> None:
        """Before the next step, once the tokens behind the rows of a draft are decided: [len(rows)] int64."""
        with self.work.timing("writing_seconds"):
            choose_draft_tokens(rows, tokens)

    @torch.inference_mode()
    def score_hidden(self, name: str, key: Hashable, tokens: Sequence[int]) -> list[float]:
        """A reward head's outputs for `tokens`, each behind the position of the text `key` whose hidden state was kept
        for it; raises as HiddenStateStore.take does."""
        with self.turn():
            hidden = self.hidden_states.take(key)
            head = self.models.heads[name].head
            features = head.features(hidden.to(head.device))
            outputs = head.at(features, to_device(tokens, features.device).unsqueeze(-1))
            return outputs.squeeze(-1).tolist()

    def step(
        self,
        logits: torch.Tensor,
        rows: Sequence[Row],
        fed: torch.Tensor | None = None,
        biased: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> None:
        """Writes guided logits into `logits` [B, V] float32 for `rows`; every other row keeps its bits.

        logits: the base model's own, before anything that a client does to them. rows: of a sequence that is not
        changed any more; the same one again stands for the same rows in the same places. fed: [B] int64 on the logits'
        device, the last token of every row of the batch, where the device knows them before the host. biased: [B, V]
        float32, the same logits after a grammar, bans and biases, -inf where a token is masked; None where no row has
        any. hidden: [B, D], the base's hidden states that the logits were computed from, which heads need. positions:
        [len(rows)] int64 on the device, where the rows are those of a draft: how many tokens of its answer are in front
        of each, which the host learns behind the step. Such rows are guided by heads alone, without a budget.
        Candidates are chosen by `biased`, and masks hold; biases and penalties are left to whoever samples, who applies
        them to what is written here. Scoring a position again is harmless. A row that cannot be scored fails alone: its
        request is marked, and the end token is forced so that it stops soon.
        """
        with self.turn(), self.measured_step(), _inference():
            self.settle()
            batch = self._find_batch(rows)
            if batch.live:
                last = _last_tokens(logits, batch.live, fed)
                alone = biased is None and positions is None
                if not (alone and self._guide_by_heads(logits, batch, hidden, last)):
                    self._flush_records()
                    if positions is None:
                        with self.work.timing("writing_seconds"):
                            begin_positions(batch.live, last)
                    self._guide(logits, batch, Readings(logits.shape[-1], logits, hidden), last, biased)
                batch = self._find_batch(rows)
            self._last_batch = batch
            if positions is not None:
                self._late.read(positions, partial(place_draft, rows))
            self.models.forget_ahead()
            if batch.failed:
                self._force_end(logits, batch.failed, logits if biased is None else biased)

    def _find_batch(self, rows: Sequence[Row]) -> "_Batch":
        """The same as in the last step where nothing has come, gone, failed or finished since."""
        if self._batch is None or self._batch.rows is not rows or self._batch.changes != self.models.changes:
            self._flush_records()
            self._batch = _Batch.of(rows, self.models.changes)
        return self._batch

    def _guide_by_heads(
        self, logits: torch.Tensor, batch: "_Batch", hidden: torch.Tensor | None, last: LastTokens
    ) -> bool:
        """Guides a batch that was the last step's too, where heads alone guide it on a CPU; returns whether it did."""
        if batch is not self._last_batch or batch.steered is None or hidden is None or not can_blend_on_cpu(logits):
            return False
        if self._persistent is None or not self._persistent.has_advanced():
            self._flush_records()
            self._persistent = self._make_persistent(logits, batch.steered, last)
        return self._persistent is not None and self._persistent.step(logits, hidden, last, self.work)

    def _make_persistent(self, logits: torch.Tensor, steered: _Split, last: LastTokens) -> PersistentBatch | None:
        by_candidates, over_vocabulary = steered.by_candidates, steered.over_vocabulary
        steps: Steps | None = None
        if not over_vocabulary:
            steps = self._candidates.find_steps(logits, by_candidates)
        elif not by_candidates:
            steps = self._vocabulary.find_steps(logits, over_vocabulary, self.models.heads)
        return None if steps is None else PersistentBatch(by_candidates or over_vocabulary, steps, last)

    def _flush_records(self) -> None:
        """Completes the requests' positions: before anything but a step like the last one needs them."""
        if self._persistent is not None:
            self._persistent.flush_records()
            self._persistent = None

    def _guide(
        self,
        logits: torch.Tensor,
        batch: "_Batch",
        readings: Readings,
        last: LastTokens,
        biased: torch.Tensor | None,
    ) -> None:
        if batch.steered is None:
            steered = _split(self._decide(logits, batch.live, readings, last))
        else:
            if batch.policies:
                with self.work.timing("policies_seconds"):
                    self.models.read_groups(readings, batch.policies, last)
            steered = batch.steered if batch.changes == self.models.changes else batch.steered.without_failed()
        if steered.by_candidates:
            self._candidates.steer(logits, steered.by_candidates, readings, last, biased)
        over_vocabulary = self._read_rewards(steered.over_vocabulary, readings, last)
        if over_vocabulary:
            with self.work.timing("writing_seconds"):
                self._vocabulary.steer(logits, over_vocabulary, readings, biased)
        self.work.steps += 1
        self.work.rows += len(steered.by_candidates) + len(steered.over_vocabulary)

    def _decide(self, logits: torch.Tensor, rows: list[Row], readings: Readings, last: LastTokens) -> list[Steered]:
        """Which formula applies to which row. Nothing is asked of a model behind a gate that closes without it."""
        with self.work.timing("writing_seconds"):
            opened = open_by_entropy(logits, [row for row in rows if may_open(row)])
        gates = {row.index: row.request.plan.gate.kl for row in opened}
        wanted = [(gate.policy, row) for row in opened if (gate := gates[row.index]) is not None]
        ungated = [row for row in opened if gates[row.index] is None]
        self._read(readings, wanted + [(t.policy, r) for r in ungated for t in r.request.plan.formula.policies], last)
        deferred = {r.index for r in opened if has_kernels(logits.device) and can_defer(r.request.plan)}
        with self.work.timing("writing_seconds"):
            asked = [r for r in opened if gates[r.index] is not None and r.index not in deferred]
            closed = closed_by_kl(logits, [row for row in asked if row.request.error is None], readings)
        steered = [
            Steered(
                row,
                row.request.plan.below if row.index in closed else row.request.plan.formula,
                gates[row.index] if row.index in deferred else None,
            )
            for row in opened
        ]
        self._read(readings, [(term.policy, s.row) for s in steered for term in s.formula.policies], last)
        steered = [s for s in steered if not s.formula.is_base and s.row.request.error is None]
        self._count_savings(rows, steered, readings)
        return steered

    def _read(self, readings: Readings, wanted: Sequence[tuple[str, Row]], last: LastTokens) -> None:
        with self.work.timing("policies_seconds"):
            self.models.read(readings, wanted, last)

    def _read_rewards(self, steered: list[Steered], readings: Readings, last: LastTokens) -> list[Steered]:
        """Reads the rewards of every token, where rows want them; returns the rows that did not fail."""
        wanted = [(term.model, s.row) for s in steered for term in s.formula.rewards]
        if not wanted:
            return steered
        with self.work.timing("rewards_seconds"):
            self.models.read(readings, wanted, last)
        return [s for s in steered if s.row.request.error is None]

    def _count_savings(self, rows: list[Row], steered: list[Steered], readings: Readings) -> None:
        scored = {s.row.index for s in steered if s.formula.rewards}
        for row in rows:
            request, plan = row.request, row.request.plan
            unread = (name for name in plan.policies if not readings.has(name, row))
            request.saved_policy_tokens += sum(name not in self.models.heads for name in unread)
            if row.index not in scored:
                spared = [self.reward_models[name].tokens_per_step(plan.formula) for name in plan.reward_models]
                request.saved_reward_model_tokens += sum(spared)

    def _force_end(self, logits: torch.Tensor, rows: list[int], biased: torch.Tensor) -> None:
        # Never against a grammar: where the end token is masked, the base's own distribution stays.
        if self.eos_token_id is None:
            return
        index = to_device(rows, logits.device)
        chosen = logits[index]
        ended = torch.full_like(chosen, -torch.inf)
        ended[:, self.eos_token_id] = 0.0
        allowed = biased[index, self.eos_token_id] > -torch.inf
        logits.index_copy_(0, index, torch.where(allowed.unsqueeze(-1), ended, chosen))

    def _forget_oldest(self) -> None:
        while len(self._requests) > _KEPT_REQUESTS:
            key, _ = self._requests.popitem(last=False)
            self.pause(key)


def _last_tokens(logits: torch.Tensor, rows: list[Row], fed: torch.Tensor | None) -> LastTokens:
    if fed is None:
        return LastTokens(rows, lambda: to_device([row.last_token for row in rows], logits.device))
    return LastTokens(rows, lambda: take_rows(fed, [row.index for row in rows]))


def _inference() -> AbstractContextManager[None]:
    """Inference mode, unless the caller is in it already: entering it again costs as much as several operations."""
    return nullcontext() if torch.is_inference_mode_enabled() else torch.inference_mode()
