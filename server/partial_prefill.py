"""What vLLM's V1 runner knows of rows whose prompt is read in pieces, and a repair for seeded ones on a CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np

PartialRows = Callable[[], np.ndarray]
"""Mask over the batch's rows, bool: those whose sample of this step will be thrown away."""


def partial_rows(model_runner: Any) -> PartialRows:
    """Reads vLLM's own mask, which is current whenever logits are processed."""
    return lambda: model_runner.discard_request_mask.np


def keep_seeded_requests_alive(model_runner: Any) -> None:
    """Lets tokens that will be thrown away be drawn without their requests' generators.

    vLLM 0.32 draws them with the generator and winds it back by its offset. A CPU generator has no offset: the call
    raises, and one seeded request whose prompt is read in pieces stops the engine.
    """
    if model_runner.device.type != "cpu":
        return
    sample_tokens = model_runner.sample_tokens

    @wraps(sample_tokens)
    def sample(*args: Any, **kwargs: Any) -> Any:
        with _without_generators(model_runner):
            return sample_tokens(*args, **kwargs)

    model_runner.sample_tokens = sample


@contextmanager
def _without_generators(model_runner: Any) -> Iterator[None]:
    batch = model_runner.input_batch
    thrown_away = np.flatnonzero(model_runner.discard_request_mask.np[: batch.num_reqs]).tolist()
    kept = {row: batch.generators.pop(row) for row in thrown_away if row in batch.generators}
    try:
        yield
    finally:
        batch.generators.update(kept)
