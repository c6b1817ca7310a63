"""What a runtime has done so far, and how long it took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

Phase = Literal["prompt", "step", "score"]
"""What is read before the last token of a prefix (the prompt; what a gate or a preemption had put off), the last token
and its candidates at a position that is decoded, and finished texts."""
PHASES: tuple[Phase, ...] = get_args(Phase)
Fault = Literal["raised", "not_finite"]
"""How a model spoils a request: it raises, or what it returns are not finite numbers."""
FAULTS: tuple[Fault, ...] = get_args(Fault)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the guidance of one request ended."""

    model: str
    fault: Fault
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
        """Adds a request that was spoiled."""
        spoiled = self.failures[failure.fault]
        spoiled[failure.model] = spoiled.get(failure.model, 0) + 1

    def count(self, phase: Phase, model: str, tokens: int) -> None:
        """Adds tokens that a model has read."""
        read = self.tokens[phase]
        read[model] = read.get(model, 0) + tokens

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Adds the duration of the context to a stage's seconds."""
        began = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + time.perf_counter() - began)
