"""What a runtime has done so far, and how long it took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


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
