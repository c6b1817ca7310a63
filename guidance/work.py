"""What a runtime has done so far, and how long it took."""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, get_args

Phase = Literal["prompt", "step", "score"]
"""What is read before the last token of a prefix (the prompt; what a gate or a preemption had put off), the last token
and its candidates at a position that is decoded, and finished texts."""
PHASES: tuple[Phase, ...] = get_args(Phase)
Fault = Literal["raised", "not_finite"]
"""How a model spoils a request: it raises, or what it returns are not finite numbers."""
FAULTS: tuple[Fault, ...] = get_args(Fault)
Misfit = Literal["too_long", "unreadable"]
"""How a request spoils itself: its text outgrows a model's window, or has no form that the model reads."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the guidance of one request ended."""

    model: str
    fault: Fault | Misfit
    reason: str
    """What its client is told."""


@dataclass
class Work:
    """What the runtime has done so far. Seconds are the host's; tokens and failures are counted by model."""

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
    tokens: dict[Phase, dict[str, int]] = field(default_factory=lambda: {phase: {} for phase in PHASES})

    failures: dict[Fault, dict[str, int]] = field(default_factory=lambda: {fault: {} for fault in FAULTS})
    """Requests that models have spoiled."""

    def count_failure(self, failure: Failure) -> None:
        """Adds a request that a model has spoiled; a misfit is the request's own fault and is not counted."""
        if failure.fault in ("raised", "not_finite"):
            spoiled = self.failures[failure.fault]
            spoiled[failure.model] = spoiled.get(failure.model, 0) + 1

    def count(self, phase: Phase, model: str, tokens: int) -> None:
        """Adds tokens that a model has read."""
        read = self.tokens[phase]
        read[model] = read.get(model, 0) + tokens

    def timing(self, stage: str) -> AbstractContextManager[None]:
        """Adds the duration of the context to a stage's seconds."""
        return _Timing(self, stage)


class _Timing:
    """Entered four times a step: a generator would cost several times as much."""

    __slots__ = ("_began", "_stage", "_work")

    def __init__(self, work: Work, stage: str) -> None:
        self._work, self._stage = work, stage

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = getattr(self._work, self._stage) + time.perf_counter() - self._began
        setattr(self._work, self._stage, seconds)
