"""Requests while they are decoded, and the rows of a batch that stand for them."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from steersman.guidance.auxiliary import Prefix
from steersman.guidance.plan import Formula, KLCondition, Plan
from steersman.guidance.report import CandidateStep, Counts, HeadStep, Position, VocabularyStep
from steersman.guidance.text_form import Source
from steersman.guidance.transfer import take_rows, to_device
from steersman.guidance.work import Fault, Misfit


@dataclass
class GuidedRequest:
    """One choice of one request while it is decoded."""

    key: Hashable
    plan: Plan
    prompt_length: int
    seed: int = 0
    """Of the Monte Carlo estimates; the same seed gives the same decisions."""
    source: Source | None = None
    """What the prompt was made of, for models that read text; without it they read the decoded prompt."""
    positions: list[Position] = field(default_factory=list)
    """One for each generated position."""
    spent: list[float] = field(default_factory=list)
    """KL(π‖π₀) of each position in nats, where the plan has a budget."""
    reward_model_tokens: int = 0
    policy_tokens: int = 0
    saved_reward_model_tokens: int = 0
    saved_policy_tokens: int = 0
    error: str | None = None
    """Why its guidance has ended."""
    fault: Fault | Misfit | None = None
    """Whose fault that is, where there is an error."""
    finished: bool = False
    """Reported on and released; a row that is still in the batch for a moment is no longer guided."""

    @property
    def budget_left(self) -> float:
        """Nats that the rest of the answer may still take."""
        return float("inf") if self.plan.kl_budget is None else self.plan.kl_budget - sum(self.spent)

    def count_policy(self, read: int, caught_up: int) -> None:
        """Tokens that a policy read in one step, of which `caught_up` had been spared before."""
        self.policy_tokens += read
        self.saved_policy_tokens = max(0, self.saved_policy_tokens - caught_up)

    def count_reward_model(self, read: int, caught_up: int) -> None:
        """Tokens that a reward model read in one step, of which `caught_up` had been spared before."""
        self.reward_model_tokens += read
        self.saved_reward_model_tokens = max(0, self.saved_reward_model_tokens - caught_up)

    @property
    def counts(self) -> Counts:
        """Tokens read and saved so far."""
        return Counts(
            self.reward_model_tokens, self.policy_tokens, self.saved_reward_model_tokens, self.saved_policy_tokens
        )


@dataclass(slots=True)
class Row:
    """A row of the batch's logits and the request behind it; `prompt` and `output` may be live lists.

    Under speculative decoding a request has a row for each drafted token and one more. Their prompt and output are
    empty: a draft's rows are for models that read no tokens.
    """

    index: int
    request: GuidedRequest
    prompt: Sequence[int]
    output: Sequence[int]
    draft_position: int | None = None
    """The position of a draft's row, where a plan needs it before the step."""
    record: Position = field(default_factory=Position)
    """What is done in the row's step."""

    @property
    def position(self) -> int:
        """How many tokens of the answer are there already."""
        if self.draft_position is not None:
            return self.draft_position
        return len(self.prompt) + len(self.output) - self.request.prompt_length

    @property
    def prefix(self) -> Prefix:
        """The tokens so far, as auxiliary models take them."""
        return Prefix(self.request.key, self.prompt, self.output, self.request.source)

    @property
    def last_token(self) -> int:
        """The last of the tokens so far."""
        return self.output[-1] if self.output else self.prompt[-1]

    def caught_up(self, read: int) -> int:
        """How many of the `read` tokens before the last one are the answer's own."""
        return min(read, max(0, len(self.output) - 1))


@dataclass(slots=True)
class Steered:
    """A row and the formula that applies to it in this step."""

    row: Row
    formula: Formula
    gate: KLCondition | None = None
    """A condition that is decided where the formula is written; the plan's `below` applies where it does not hold."""

    def record(self, step: CandidateStep | HeadStep | VocabularyStep, line: int) -> None:
        """Keeps what is done at this position: line `line` of `step`."""
        position = self.row.record
        position.step, position.line, position.formula = step, line, self.formula
        if self.gate is not None:
            position.below = self.row.request.plan.below


class LastTokens:
    """The last token of every row of a step, on the device."""

    def __init__(self, rows: Sequence[Row], tokens: Callable[[], torch.Tensor]) -> None:
        """tokens: returns [len(rows)] int64; called at most once, and not at all where no model reads a token."""
        self._compute = tokens
        self._rows = rows

    @cached_property
    def tokens(self) -> torch.Tensor:
        """[rows] int64."""
        return self._compute()

    def of(self, rows: Sequence[Row]) -> torch.Tensor:
        """Those of some of the rows, [len(rows)] int64."""
        places = self._places
        return take_rows(self.tokens, [places[row.index] for row in rows])

    @cached_property
    def _places(self) -> dict[int, int]:
        return {row.index: place for place, row in enumerate(self._rows)}


def begin_positions(rows: Sequence[Row], last: LastTokens) -> None:
    """Opens the record of this step in every request; `last` are the tokens that it follows.

    A position that is scored again replaces what was recorded.
    """
    align_records(rows, last)
    for row in rows:
        request = row.request
        row.record = Position()
        request.positions.append(row.record)
        if request.plan.kl_budget is not None:
            request.spent.append(0.0)


def align_records(rows: Sequence[Row], last: LastTokens) -> None:
    """Makes the record of every request end in front of this step, and completes its last position by the token in
    `last`."""
    waiting = []
    for row in rows:
        request = row.request
        positions, position = request.positions, len(row.prompt) + len(row.output) - request.prompt_length
        if len(positions) != position:
            _wind_to(row, position)
        if positions and isinstance(positions[-1].step, VocabularyStep):
            waiting.append(row)
    if waiting:
        records = [(row.request.positions[-1], row.request.plan.trace) for row in waiting]
        _choose_tokens(records, last.of(waiting))


def _wind_to(row: Row, position: int) -> None:
    """Makes a request's record end in front of `position`."""
    request = row.request
    del request.positions[position:]
    del request.spent[position:]
    if len(request.positions) < position:
        _resume(row)


def _resume(row: Row) -> None:
    """Positions that another worker guided, before the request came back here, stay empty."""
    request = row.request
    choose_known_tokens(request, row.output)
    request.positions += [Position() for _ in range(row.position - len(request.positions))]


def choose_known_tokens(request: GuidedRequest, response: Sequence[int]) -> None:
    """Completes the record of the positions whose tokens were not known yet; those behind `response`, computed ahead of
    a stop or of a token that was rejected, are dropped."""
    del request.positions[len(response) :]
    del request.spent[len(response) :]
    waiting = {n: p for n, p in enumerate(request.positions) if isinstance(p.step, VocabularyStep)}
    if waiting:
        records = [(position, request.plan.trace) for position in waiting.values()]
        step = next(iter(waiting.values())).step
        assert isinstance(step, VocabularyStep)
        _choose_tokens(records, to_device([response[n] for n in waiting], step.base.device))


def choose_draft_tokens(rows: Sequence[Row], tokens: torch.Tensor) -> None:
    """Completes the record of the rows of a draft; tokens: [len(rows)] int64, of the texts as they are now, behind each
    row. What is recorded of a row whose token was rejected is of no use to anyone."""
    waiting = [n for n, row in enumerate(rows) if isinstance(row.record.step, VocabularyStep)]
    if waiting:
        records = [(rows[n].record, rows[n].request.plan.trace) for n in waiting]
        _choose_tokens(records, take_rows(tokens, waiting))


def place_draft(rows: Sequence[Row], positions: Sequence[int]) -> None:
    """Puts the records of a draft's rows where they belong in their requests, in place of what an earlier draft, whose
    tokens were rejected, has left there. positions: of each row."""
    for row, position in zip(rows, positions, strict=True):
        records = row.request.positions
        records += [Position() for _ in range(position + 1 - len(records))]
        records[position] = row.record


def _choose_tokens(records: Sequence[tuple[Position, bool]], tokens: torch.Tensor) -> None:
    """Replaces the steps over the whole vocabulary by what became of them now that their tokens [len(records)] int64
    are known. records: each with whether it is traced."""
    waiting: dict[int, tuple[VocabularyStep, list[Position], list[int]]] = {}
    for place, (position, traced) in enumerate(records):
        assert isinstance(position.step, VocabularyStep)
        if traced:
            position.traced = position.step.trace(position.line, position.formula.rewards)
        _, positions, places = waiting.setdefault(id(position.step), (position.step, [], []))
        positions.append(position)
        places.append(place)
    for step, positions, places in waiting.values():
        chosen = tokens if len(places) == len(tokens) else tokens[to_device(places, tokens.device)]
        outcome = step.choose([position.line for position in positions], chosen)
        for line, position in enumerate(positions):
            position.step, position.line = outcome, line
