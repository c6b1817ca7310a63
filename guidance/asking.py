"""Asking auxiliary models: each once for all rows that need it, a row that spoils it alone, and every token counted."""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from steersman.guidance.auxiliary import TextTooLong, TextUnreadable
from steersman.guidance.gates import certain_readers, may_open
from steersman.guidance.head_models import HeadModel, HeadPolicy, HeadReward
from steersman.guidance.plan import Formula
from steersman.guidance.policies import Policy
from steersman.guidance.readings import OutputLayer, Readings
from steersman.guidance.rewards import RewardModel, VocabularyReward
from steersman.guidance.rows import LastTokens, Row
from steersman.guidance.tokenizers import name_model
from steersman.guidance.transfer import LateReads, take_rows, to_device
from steersman.guidance.work import FAULTS, Failure, Fault, Misfit, Work
from steersman.kernels.arguments import HeadWeights

logger = logging.getLogger(__name__)

AnyReward = RewardModel | HeadReward
AnyPolicy = Policy | HeadPolicy
_Ask = Callable[[list[int]], tuple[torch.Tensor, list[int]]]
"""Places among the rows → answers [len(places), width] and the prefix tokens read for the first time."""


@dataclass(frozen=True, slots=True)
class _Ahead:
    """What a model said of rows before the step that needs it."""

    lines: dict[tuple[Hashable, int], int]
    """By request and length of its prefix."""
    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Part:
    """The reward terms that one model scores, in all rows that have one."""

    model: str
    end_token: bool
    lines: list[int]
    """Rows that have them; `index` on the device, None where all do."""
    index: torch.Tensor | None
    places: torch.Tensor
    """[n, 2]: row and term."""
    hidden: torch.Tensor | None
    """[n]: the rows' places in the base's hidden states, for a head; None for any other model."""
    tokens: list[int]
    """That the model reads for each of the rows in one step."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """Which model scores which rows' terms; the same in every step over the same formulas."""

    terms: int
    """Number of reward terms of the row that has most."""
    parts: list[_Part]
    aligned: bool
    """Whether each part is one term, the same in every row, in their order."""
    device: torch.device
    """Of the base's logits."""


class Auxiliaries:
    """The reward models and policies of a runtime."""

    def __init__(
        self,
        reward_models: Mapping[str, AnyReward],
        policies: Mapping[str, AnyPolicy],
        eos_token_id: int | None,
        late: LateReads,
        work: Work,
    ) -> None:
        self.reward_models: dict[str, AnyReward] = {}
        self.policies: dict[str, AnyPolicy] = {}
        self.readers: dict[str, Policy | VocabularyReward] = {}
        """Models that compute something for every next token from the prefix alone, in a forward of their own."""
        self.heads: dict[str, HeadModel] = {}
        """Models that compute it from the base's hidden state."""
        self.scorers: dict[str, RewardModel] = {}
        """Reward models that score texts by themselves."""
        self._eos_token_id = eos_token_id
        self._late = late
        self._work = work
        self._ahead: dict[str, _Ahead] = {}
        self.changes = 0
        """How often models have come or gone, and requests have failed or finished: what was laid out before a change
        no longer holds."""
        for reward_model in reward_models.values():
            self._add_reward_model(reward_model)
        for policy in policies.values():
            self._add_policy(policy)

    @property
    def by_name(self) -> dict[str, AnyReward | AnyPolicy]:
        """All reward models and policies; they share no name."""
        return {**self.reward_models, **self.policies}

    def scores_every_token(self, name: str) -> bool:
        """Whether a model has an output for every next token, and not for given candidates only."""
        return name in self.readers or name in self.heads

    def add(self, model: AnyReward | AnyPolicy) -> None:
        """From the next step on requests may name it."""
        if isinstance(model, Policy | HeadPolicy):
            self._add_policy(model)
        else:
            self._add_reward_model(model)

    def _add_policy(self, policy: AnyPolicy) -> None:
        self.changes += 1
        self.policies[policy.name] = policy
        if isinstance(policy, HeadPolicy):
            self.heads[policy.name] = policy
        else:
            self.readers[policy.name] = policy

    def _add_reward_model(self, model: AnyReward) -> None:
        self.changes += 1
        self.reward_models[model.name] = model
        if isinstance(model, HeadReward):
            self.heads[model.name] = model
        else:
            self.scorers[model.name] = model
        if isinstance(model, VocabularyReward):
            self.readers[model.name] = model

    def remove(self, name: str) -> AnyReward | AnyPolicy:
        """Takes a model out; no request that is still decoded may name it."""
        self.changes += 1
        for known in (self._ahead, self.readers, self.heads, self.scorers):
            known.pop(name, None)
        return self.policies.pop(name) if name in self.policies else self.reward_models.pop(name)

    def release(self, key: Hashable, tokens: Sequence[int] | None = None, failed: bool = False) -> None:
        """Gives back what a request holds in the models' caches."""
        for reward_model in self.reward_models.values():
            reward_model.release(key, tokens, failed)
        for policy in self.policies.values():
            policy.release(key, tokens, failed)

    def fail(self, row: Row, failure: Failure) -> None:
        """Ends the guidance of one row, for good."""
        if row.request.error is None:
            row.request.error, row.request.fault = failure.reason, failure.fault
            self.changes += 1
            self._work.count_failure(failure)
            level = logging.WARNING if failure.fault in FAULTS else logging.INFO
            logger.log(level, "a guided request failed: %s", failure.reason)
        self.release(row.request.key, failed=True)

    def fail_where(self, rows: Sequence[Row], broken: torch.Tensor, explain: Callable[[int], Failure]) -> None:
        """Fails the rows for which `broken` [len(rows)] bool holds, as soon as the host learns of them. `explain` says
        why for a place among the rows."""

        def use(flags: list[bool]) -> None:
            if True not in flags:
                return
            for place, flag in enumerate(flags):
                if flag and not rows[place].request.finished:
                    self.fail(rows[place], explain(place))

        self._late.read(broken, use)

    def find_narrower(self, vocabulary: int) -> dict[str, int]:
        """Models whose token ids are fewer than the base's logits, which may be padded, and how many they read."""
        sizes = {name: model.vocabulary for name, model in self.by_name.items()}
        return {name: size for name, size in sizes.items() if size is not None and size < vocabulary}

    def plan_ahead(self, rows: Sequence[Row]) -> dict[str, list[Row]]:
        """Rows by the model that their next step needs whatever the base says, where it has read the rows so far."""
        self._ahead.clear()
        groups: dict[str, list[Row]] = {}
        for row in rows:
            request = row.request
            if request.error is None and not request.finished and may_open(row):
                for name in dict.fromkeys(certain_readers(request.plan)):
                    if name in self.readers and self.readers[name].covers(request.key, len(row.prefix) - 1):
                        groups.setdefault(name, []).append(row)
        return groups

    def read_ahead(self, groups: Mapping[str, list[Row]], last: LastTokens) -> None:
        """Asks on the current stream, for the next step. What fails is asked again there, where it is known whom to
        blame."""
        for name, group in groups.items():
            try:
                logits, _ = self.readers[name].read([row.prefix for row in group], last.of(group))
            except Exception as error:
                logger.debug("%s was not read ahead: %s", name, error)
                continue
            places = {(row.request.key, len(row.prefix)): line for line, row in enumerate(group)}
            self._ahead[name] = _Ahead(places, logits)

    def forget_ahead(self) -> None:
        """What was read ahead is of use to one step only."""
        self._ahead.clear()

    def read(self, readings: Readings, wanted: Sequence[tuple[str, Row]], last: LastTokens) -> None:
        """Adds what the named models say of the rows, one forward for each model that has not been read yet."""
        groups: dict[str, dict[int, Row]] = {}
        for name, row in wanted:
            if row.request.error is None and not readings.has(name, row):
                groups.setdefault(name, {})[row.index] = row
        self.read_groups(readings, {name: list(group.values()) for name, group in groups.items()}, last)

    def read_groups(self, readings: Readings, groups: Mapping[str, list[Row]], last: LastTokens) -> None:
        """As `read`, for rows by the model that has not read them yet; none of them has failed."""
        for name, rows in groups.items():
            if name in self.heads:
                self._read_head(readings, name, rows)
                continue
            rest = self._take_ahead(readings, name, rows, last)
            if rest:
                self._read_now(readings, name, rest, last)

    def _read_head(self, readings: Readings, name: str, rows: list[Row]) -> None:
        head = self.heads[name]
        if readings.hidden is None:
            self._fail_without_hidden(name, rows)
            return
        features = head.head.features(take_rows(readings.hidden, [row.index for row in rows]).to(head.head.device))
        if head.adds_base:
            # Rewards are looked at where they are combined; a distribution without numbers would pass for the base's.
            rows, features = self._fail_not_finite(head, rows, features, ~features.isfinite().all(dim=-1))
        if rows:
            readings.add(name, rows, features, head.head, head.adds_base)

    def _fail_not_finite(
        self, model: AnyPolicy | AnyReward | HeadModel, rows: list[Row], outputs: torch.Tensor, broken: torch.Tensor
    ) -> tuple[list[Row], torch.Tensor]:
        """Fails the rows for which `broken` [len(rows)] bool holds; returns those that have not failed yet, and their
        outputs."""
        reason = f"{name_model(model)} returned logits that are not finite numbers"
        before = self.changes
        self.fail_where(rows, broken, lambda _: Failure(model.name, "not_finite", reason))
        if self.changes == before:
            return rows, outputs
        good = [g for g, row in enumerate(rows) if row.request.error is None]
        return [rows[g] for g in good], take_rows(outputs, good) if good else outputs[:0]

    def _take_ahead(self, readings: Readings, name: str, rows: list[Row], last: LastTokens) -> list[Row]:
        ahead = self._ahead.get(name)
        if ahead is None:
            return rows
        there = [row for row in rows if (row.request.key, len(row.prefix)) in ahead.lines]
        if there:
            lines = [ahead.lines[row.request.key, len(row.prefix)] for row in there]
            self._add(readings, name, there, take_rows(ahead.logits, lines), [0] * len(there), last)
        return [row for row in rows if (row.request.key, len(row.prefix)) not in ahead.lines]

    def _read_now(self, readings: Readings, name: str, rows: list[Row], last: LastTokens) -> None:
        model = self.readers[name]
        self._know_tokens(rows, model)

        def ask(places: list[int]) -> tuple[torch.Tensor, list[int]]:
            part = [rows[g] for g in places]
            return model.read([row.prefix for row in part], last.of(part))

        self._add(readings, name, rows, *self._ask(name, rows, ask), last)

    def _add(
        self,
        readings: Readings,
        name: str,
        rows: list[Row],
        logits: torch.Tensor,
        caught_up: list[int],
        last: LastTokens,
    ) -> None:
        logits = self._spoil_unreadable(self.readers[name], rows, logits, last, readings.vocabulary)
        broken = ~(logits < torch.inf).all(dim=-1)
        good, outputs = self._fail_not_finite(self.readers[name], rows, logits, broken)
        if good:
            layer: OutputLayer | None = self.readers[name].layer
            readings.add(name, good, outputs, layer)
        self._work.count("prompt", name, sum(caught_up))
        self._work.count("step", name, len(rows))
        for row, read_before in zip(rows, caught_up, strict=True):
            if name in self.policies:
                row.request.count_policy(read_before + 1, row.caught_up(read_before))
            else:
                row.request.count_reward_model(read_before + 1, row.caught_up(read_before))

    def plan_scoring(self, index: torch.Tensor, formulas: Sequence[Formula]) -> Scoring:
        """Which model scores which rows' terms, where the rows `index` [G] of the logits have these formulas, for
        `score`."""
        device = index.device
        groups: dict[tuple[str, bool], list[tuple[int, int]]] = {}
        for g, formula in enumerate(formulas):
            for m, term in enumerate(formula.rewards):
                groups.setdefault((term.model, formula.end_token), []).append((g, m))
        terms = max(len(formula.rewards) for formula in formulas)
        parts = []
        for (name, end_token), own in groups.items():
            lines = [g for g, _ in own]
            tokens = [self.reward_models[name].tokens_per_step(formulas[g]) for g in lines]
            every = None if len(lines) == len(formulas) else to_device(lines, device)
            hidden = None
            if name in self.heads:
                hidden = index if every is None else index[every]
            parts.append(_Part(name, end_token, lines, every, to_device(own, device), hidden, tokens))
        every_row = range(len(formulas))
        aligned = list(groups.values()) == [[(g, m) for g in every_row] for m in range(terms)]
        return Scoring(terms, parts, aligned, device)

    def find_heads(self, scoring: Scoring) -> list[HeadWeights] | None:
        """The heads that score every row's terms, one each; None where other models score some, or not every row, or a
        head lies on another device than the rows."""
        if not scoring.aligned or any(part.hidden is None for part in scoring.parts):
            return None
        heads = [self.heads[part.model].head for part in scoring.parts]
        return [head.weights for head in heads] if all(head.device == scoring.device for head in heads) else None

    def score(
        self, rows: list[Row], scoring: Scoring, ids: torch.Tensor, readings: Readings, last: LastTokens
    ) -> torch.Tensor:
        """Rewards [G, terms, k] float32 of every row's terms for the candidates `ids` [G, k] int64; NaN where there is
        no term or it could not be scored."""
        scored = [self._score_part(part, rows, ids, readings, last) for part in scoring.parts]
        if scoring.aligned:
            return torch.stack(scored, dim=1)
        rewards = ids.new_full((len(rows), scoring.terms, ids.shape[1]), torch.nan, dtype=torch.float32)
        for part, values in zip(scoring.parts, scored, strict=True):
            rewards[part.places[:, 0], part.places[:, 1]] = values
        return rewards

    def _score_part(
        self, part: _Part, rows: list[Row], ids: torch.Tensor, readings: Readings, last: LastTokens
    ) -> torch.Tensor:
        candidates = ids if part.index is None else ids[part.index]
        if part.hidden is not None:
            return self._score_by_head(part, rows, candidates, readings)
        asked = rows if part.index is None else [rows[g] for g in part.lines]
        if part.model in self.readers:
            return self._look_up(readings, part.model, asked, candidates, last)
        scored = self._score_with(part, asked, candidates, last)
        return self._spoil_unreadable(self.reward_models[part.model], asked, scored, last, readings.vocabulary)

    def _score_by_head(
        self, part: _Part, rows: list[Row], candidates: torch.Tensor, readings: Readings
    ) -> torch.Tensor:
        if readings.hidden is None:
            self._fail_without_hidden(part.model, [rows[g] for g in part.lines])
            return torch.full(candidates.shape, torch.nan, device=candidates.device)
        head = self.heads[part.model].head
        tokens = candidates.to(head.device)
        if head.vocabulary < readings.vocabulary:
            # Tokens that it does not have are none of the support.
            tokens = tokens.clamp(max=head.vocabulary - 1)
        return head.at(head.features(readings.hidden[part.hidden].to(head.device)), tokens).to(candidates.device)

    def _fail_without_hidden(self, name: str, rows: Sequence[Row]) -> None:
        reason = f"{name_model(self.heads[name])} needs the base's hidden states, which are not there"
        for row in rows:
            self.fail(row, Failure(name, "raised", reason))

    def _look_up(
        self, readings: Readings, name: str, rows: list[Row], candidates: torch.Tensor, last: LastTokens
    ) -> torch.Tensor:
        self.read(readings, [(name, row) for row in rows], last)
        known = [g for g, row in enumerate(rows) if readings.has(name, row)]
        if len(known) == len(rows):
            return readings.gather_at(name, rows, candidates).to(candidates.device)
        scored = torch.full(candidates.shape, torch.nan, device=candidates.device)
        if known:
            values = readings.gather_at(name, [rows[g] for g in known], candidates[known])
            scored[known] = values.to(candidates.device)
        return scored

    def _score_with(self, part: _Part, rows: list[Row], candidates: torch.Tensor, last: LastTokens) -> torch.Tensor:
        name, step_tokens = part.model, part.tokens
        model, end = self.scorers[name], self._eos_token_id if part.end_token else None
        self._know_tokens(rows, model)

        def ask(places: list[int]) -> tuple[torch.Tensor, list[int]]:
            own = [rows[g] for g in places]
            chosen = candidates if len(own) == len(rows) else candidates[places]
            return model.score([row.prefix for row in own], chosen, end, last.of(own))

        scored, read = self._ask(name, rows, ask, candidates.shape[1])
        # A model that scores text keeps nothing: what it reads is read again at every position.
        self._work.count("prompt" if any(step_tokens) else "step", name, sum(read))
        self._work.count("step", name, sum(step_tokens))
        for row, read_before, tokens in zip(rows, read, step_tokens, strict=True):
            row.request.count_reward_model(read_before + tokens, row.caught_up(read_before) if tokens else 0)
        return scored.to(candidates.device)

    def _spoil_unreadable(
        self, model: AnyPolicy | AnyReward, rows: list[Row], outputs: torch.Tensor, last: LastTokens, vocabulary: int
    ) -> torch.Tensor:
        """Fails the rows whose last token, which the host may not know yet, the model cannot read. Their outputs are
        NaN, so that the base decodes them until the host learns of it.

        outputs: [len(rows), width] of the model. vocabulary: width of the base's logits.
        """
        if model.vocabulary is None or model.vocabulary >= vocabulary:
            return outputs
        unreadable = last.of(rows) >= model.vocabulary
        reason = (
            f"{name_model(model)} could not read the answer: it reads the token ids 0 to {model.vocabulary - 1}, and "
            "the last token lies beyond; keep the base to those with allowed_token_ids or logit_bias, or use a model "
            "with as large a vocabulary as the base's"
        )
        failure = Failure(model.name, "unreadable", reason)
        self.fail_where(rows, unreadable, lambda _: failure)
        return outputs.masked_fill(unreadable.to(outputs.device).unsqueeze(-1), torch.nan)

    def _know_tokens(self, rows: Sequence[Row], model: AnyPolicy | AnyReward) -> None:
        """A model that has to catch up reads tokens that the host may not know yet."""
        if not all(model.covers(row.request.key, len(row.prefix) - 1) for row in rows):
            self._late.settle(wait=True)

    def _ask(self, name: str, rows: list[Row], ask: _Ask, width: int = 1) -> tuple[torch.Tensor, list[int]]:
        """Asks a model for all rows at once; where one of them spoils it, one by one, so that the others go on."""
        try:
            return ask(list(range(len(rows))))
        except Exception as error:
            if len(rows) == 1:
                self.fail(rows[0], _blame(self.by_name[name], error))
                return torch.full((1, width), torch.nan), [0]
        answers, read = [], []
        for g, row in enumerate(rows):
            answer, tokens = self._ask(name, [row], lambda _, g=g: ask([g]), width)  # type: ignore[misc]
            answers.append(answer)
            read += tokens
        widest = max(answer.shape[-1] for answer in answers)
        whole = [a if a.shape[-1] == widest else a.new_full((1, widest), torch.nan) for a in answers]
        return torch.cat([a.to(answers[0].device) for a in whole]), read


def _blame(model: AnyReward | AnyPolicy, error: Exception) -> Failure:
    """Why the guidance of a row ended, whose text a model could not read."""
    if isinstance(error, TextTooLong):
        return Failure(model.name, "too_long", str(error))
    fault: Fault | Misfit = "unreadable" if isinstance(error, TextUnreadable) else "raised"
    return Failure(model.name, fault, f"{name_model(model)} could not read the answer: {error}")
