"""Requests while they are decoded, and the rows of a batch that stand for them."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from steersman.guidance.auxiliary import Prefix
from steersman.guidance.plan import Formula, Plan
from steersman.guidance.report import Counts, Position, VocabularyStep


@dataclass
class GuidedRequest:
    """One choice of one request while it is decoded."""

    key: Hashable
    plan: Plan
    prompt_length: int
    seed: int = 0
    """Of the Monte Carlo estimates; the same seed gives the same decisions."""
    positions: list[Position] = field(default_factory=list)
    """One for each generated position."""
    spent: list[float] = field(default_factory=list)
    """KL(π‖π₀) of each position in nats, where the plan has a budget."""
    reward_model_tokens: int = 0
    policy_tokens: int = 0
    saved_reward_model_tokens: int = 0
    saved_policy_tokens: int = 0
    error: str | None = None
    finished: bool = False
    """Reported on and released; a row that is still in the batch for a moment is no longer guided."""

    @property
    def budget_left(self) -> float:
        """Nats that the rest of the answer may still take."""
        return float("inf") if self.plan.kl_budget is None else self.plan.kl_budget - sum(self.spent)

    @property
    def counts(self) -> Counts:
        """Tokens read and saved so far."""
        return Counts(
            self.reward_model_tokens, self.policy_tokens, self.saved_reward_model_tokens, self.saved_policy_tokens
        )


@dataclass(slots=True)
class Row:
    """A row of the batch's logits and the request behind it; `prompt` and `output` may be live lists."""

    index: int
    request: GuidedRequest
    prompt: Sequence[int]
    output: Sequence[int]

    @property
    def position(self) -> int:
        """How many tokens of the answer are there already."""
        return len(self.prompt) + len(self.output) - self.request.prompt_length

    @property
    def prefix(self) -> Prefix:
        """The tokens so far, as auxiliary models take them."""
        return Prefix(self.request.key, self.prompt, self.output)

    def caught_up(self, read: int) -> int:
        """How many of the `read` tokens before the last one are the answer's own."""
        return min(read, max(0, len(self.output) - 1))


@dataclass(slots=True)
class Steered:
    """A row and the formula that applies to it in this step."""

    row: Row
    formula: Formula

    @property
    def position(self) -> Position:
        """The record of this step."""
        return self.row.request.positions[-1]


def begin_positions(rows: Sequence[Row]) -> None:
    """Opens the record of this step in every request. A position that is scored again replaces what was recorded."""
    for row in rows:
        request = row.request
        del request.positions[row.position :]
        del request.spent[row.position :]
    _choose_tokens([(row.request, row.output[-1]) for row in rows if row.output])
    for row in rows:
        row.request.positions.append(Position())
        if row.request.plan.kl_budget is not None:
            row.request.spent.append(0.0)


def choose_last_token(request: GuidedRequest, response: Sequence[int]) -> None:
    """Completes the record of an answer's last position; those computed ahead of a stop are dropped."""
    del request.positions[len(response) :]
    del request.spent[len(response) :]
    if response and len(request.positions) == len(response):
        _choose_tokens([(request, response[-1])])


def _choose_tokens(chosen: Sequence[tuple[GuidedRequest, int]]) -> None:
    """Replaces the last step over the whole vocabulary of each request by what became of it."""
    waiting: dict[int, tuple[VocabularyStep, list[Position], list[int]]] = {}
    for request, token in chosen:
        position = request.positions[-1] if request.positions else None
        if position is not None and isinstance(position.step, VocabularyStep):
            if request.plan.trace:
                position.traced = position.step.trace(position.line)
            _, positions, tokens = waiting.setdefault(id(position.step), (position.step, [], []))
            positions.append(position)
            tokens.append(token)
    for step, positions, tokens in waiting.values():
        outcomes = step.choose([position.line for position in positions], tokens)
        for position, outcome in zip(positions, outcomes, strict=True):
            position.step = outcome
