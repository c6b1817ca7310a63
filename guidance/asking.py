"""Asking auxiliary models: each once for all rows that need it, a row that spoils it alone, and every token counted."""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from steersman.guidance.gates import certain_readers, may_open
from steersman.guidance.plan import Formula
from steersman.guidance.policies import Policy
from steersman.guidance.readings import Readings
from steersman.guidance.rewards import RewardModel, VocabularyReward
from steersman.guidance.rows import LastTokens, Row
from steersman.guidance.tokenizers import name_model
from steersman.guidance.transfer import LateReads, to_device
from steersman.guidance.work import Failure, Work

logger = logging.getLogger(__name__)

_Ask = Callable[[list[int]], tuple[torch.Tensor, list[int]]]
"""Places among the rows → answers [len(places), width] and the prefix tokens read for the first time."""


@dataclass(frozen=True, slots=True)
class _Ahead:
    """What a model said of rows before the step that needs it."""

    lines: dict[tuple[Hashable, int], int]
    """By request and length of its prefix."""
    logits: torch.Tensor


class Auxiliaries:
    """The reward models and policies of a runtime."""

    def __init__(
        self,
        reward_models: Mapping[str, RewardModel],
        policies: Mapping[str, Policy],
        eos_token_id: int | None,
        late: LateReads,
        work: Work,
    ) -> None:
        self.reward_models = dict(reward_models)
        self.policies = dict(policies)
        self.readers: dict[str, Policy | VocabularyReward] = {
            **self.policies,
            **{name: model for name, model in self.reward_models.items() if isinstance(model, VocabularyReward)},
        }
        """Models that say something of every next token from the prefix alone."""
        self._eos_token_id = eos_token_id
        self._late = late
        self._work = work
        self._ahead: dict[str, _Ahead] = {}

    @property
    def by_name(self) -> dict[str, RewardModel | Policy]:
        """All reward models and policies; they share no name."""
        return {**self.reward_models, **self.policies}

    def add(self, model: RewardModel | Policy) -> None:
        """From the next step on it may be asked by its name."""
        if isinstance(model, Policy):
            self.policies[model.name] = model
        else:
            self.reward_models[model.name] = model
        if isinstance(model, Policy | VocabularyReward):
            self.readers[model.name] = model

    def remove(self, name: str) -> RewardModel | Policy:
        """Takes a model out; no request that is still decoded may name it."""
        self._ahead.pop(name, None)
        self.readers.pop(name, None)
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
            row.request.error = failure.reason
            self._work.count_failure(failure)
            logger.warning("a guided request failed: %s", failure.reason)
        self.release(row.request.key, failed=True)

    def fail_where(self, rows: Sequence[Row], broken: torch.Tensor, explain: Callable[[int], Failure]) -> None:
        """Fails the rows for which `broken` [len(rows)] bool holds, as soon as the host learns of them. `explain` says
        why for a place among the rows."""

        def use(flags: list[bool]) -> None:
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
        for name, group in groups.items():
            rest = self._take_ahead(readings, name, list(group.values()), last)
            if rest:
                self._read_now(readings, name, rest, last)

    def _take_ahead(self, readings: Readings, name: str, rows: list[Row], last: LastTokens) -> list[Row]:
        ahead = self._ahead.get(name)
        if ahead is None:
            return rows
        there = [row for row in rows if (row.request.key, len(row.prefix)) in ahead.lines]
        if there:
            lines = [ahead.lines[row.request.key, len(row.prefix)] for row in there]
            whole = lines == list(range(len(ahead.logits)))
            logits = ahead.logits if whole else ahead.logits[to_device(lines, ahead.logits.device)]
            self._add(readings, name, there, logits, [0] * len(there), last)
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
        failure = Failure(
            name, "not_finite", f"{name_model(self.readers[name])} returned logits that are not finite numbers"
        )
        self.fail_where(rows, ~(logits < torch.inf).all(dim=-1), lambda _: failure)
        good = [g for g, row in enumerate(rows) if row.request.error is None]
        if good:
            whole = len(good) == len(rows)
            readings.add(name, [rows[g] for g in good], logits if whole else logits[to_device(good, logits.device)])
        self._work.count("prompt", name, sum(caught_up))
        self._work.count("step", name, len(rows))
        for row, read_before in zip(rows, caught_up, strict=True):
            if name in self.policies:
                row.request.count_policy(read_before + 1, row.caught_up(read_before))
            else:
                row.request.count_reward_model(read_before + 1, row.caught_up(read_before))

    def score(
        self, rows: list[Row], formulas: list[Formula], ids: torch.Tensor, readings: Readings, last: LastTokens
    ) -> torch.Tensor:
        """Rewards [G, terms, k] float32 of every row's terms for the candidates `ids` [G, k] int64; NaN where there is
        no term or it could not be scored."""
        terms = max(len(formula.rewards) for formula in formulas)
        groups: dict[tuple[str, bool], list[tuple[int, int]]] = {}
        for g, formula in enumerate(formulas):
            for m, term in enumerate(formula.rewards):
                groups.setdefault((term.model, formula.end_token), []).append((g, m))
        rewards = None
        for (name, end_token), places in groups.items():
            lines = [g for g, _ in places]
            candidates = ids if len(lines) == len(ids) else ids[to_device(lines, ids.device)]
            asked = [rows[g] for g in lines]
            if name in self.readers:
                scored = self._look_up(readings, name, asked, candidates, last)
            else:
                tokens = [self.reward_models[name].tokens_per_step(formulas[g]) for g in lines]
                scored = self._score_with(name, asked, candidates, end_token, tokens, last)
                scored = self._spoil_unreadable(self.reward_models[name], asked, scored, last, readings.vocabulary)
            if terms == 1 and len(places) == len(rows):
                return scored.unsqueeze(1)
            if rewards is None:
                rewards = scored.new_full((len(rows), terms, ids.shape[1]), torch.nan)
            at = to_device(places, rewards.device)
            rewards[at[:, 0], at[:, 1]] = scored
        assert rewards is not None
        return rewards

    def _look_up(
        self, readings: Readings, name: str, rows: list[Row], candidates: torch.Tensor, last: LastTokens
    ) -> torch.Tensor:
        self.read(readings, [(name, row) for row in rows], last)
        known = [g for g, row in enumerate(rows) if readings.has(name, row)]
        if len(known) == len(rows):
            return readings.gather(name, rows).to(candidates.device).gather(1, candidates)
        scored = torch.full(candidates.shape, torch.nan, device=candidates.device)
        if known:
            values = readings.gather(name, [rows[g] for g in known]).to(candidates.device)
            scored[known] = values.gather(1, candidates[known])
        return scored

    def _score_with(
        self,
        name: str,
        rows: list[Row],
        candidates: torch.Tensor,
        end_token: bool,
        step_tokens: list[int],
        last: LastTokens,
    ) -> torch.Tensor:
        model, end = self.reward_models[name], self._eos_token_id if end_token else None
        self._know_tokens(rows, model)

        def ask(places: list[int]) -> tuple[torch.Tensor, list[int]]:
            part = [rows[g] for g in places]
            chosen = candidates if len(part) == len(rows) else candidates[places]
            return model.score([row.prefix for row in part], chosen, end, last.of(part))

        scored, read = self._ask(name, rows, ask, candidates.shape[1])
        # A model that scores text keeps nothing: what it reads is read again at every position.
        self._work.count("prompt" if any(step_tokens) else "step", name, sum(read))
        self._work.count("step", name, sum(step_tokens))
        for row, read_before, tokens in zip(rows, read, step_tokens, strict=True):
            row.request.count_reward_model(read_before + tokens, row.caught_up(read_before) if tokens else 0)
        return scored.to(candidates.device)

    def _spoil_unreadable(
        self, model: Policy | RewardModel, rows: list[Row], outputs: torch.Tensor, last: LastTokens, vocabulary: int
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
            "the last token lies beyond"
        )
        failure = Failure(model.name, "raised", reason)
        self.fail_where(rows, unreadable, lambda _: failure)
        return outputs.masked_fill(unreadable.to(outputs.device).unsqueeze(-1), torch.nan)

    def _know_tokens(self, rows: Sequence[Row], model: Policy | RewardModel) -> None:
        """A model that has to catch up reads tokens that the host may not know yet."""
        if not all(model.covers(row.request.key, len(row.prefix) - 1) for row in rows):
            self._late.settle(wait=True)

    def _ask(self, name: str, rows: list[Row], ask: _Ask, width: int = 1) -> tuple[torch.Tensor, list[int]]:
        """Asks a model for all rows at once; where one of them spoils it, one by one, so that the others go on."""
        try:
            return ask(list(range(len(rows))))
        except Exception as error:
            if len(rows) == 1:
                reason = f"{name_model(self.by_name[name])} could not read the answer: {error}"
                self.fail(rows[0], Failure(name, "raised", reason))
                return torch.full((1, width), torch.nan), [0]
        answers, read = [], []
        for g, row in enumerate(rows):
            answer, tokens = self._ask(name, [row], lambda _, g=g: ask([g]), width)  # type: ignore[misc]
            answers.append(answer)
            read += tokens
        widest = max(answer.shape[-1] for answer in answers)
        whole = [a if a.shape[-1] == widest else a.new_full((1, widest), torch.nan) for a in answers]
        return torch.cat([a.to(answers[0].device) for a in whole]), read
