"""What guidance did to one answer: the numbers that every guided response carries."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from steersman.guidance.plan import Plan


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step's candidates, shared by all of its rows."""

    ids: torch.Tensor
    """[G, k] int64."""
    base_logprobs: torch.Tensor
    """[G, k] float32, normalised over the vocabulary; -inf where a candidate is masked."""
    bonus: torch.Tensor
    """[G, k] float32: what guidance adds to the log-probability."""
    rewards: torch.Tensor
    """[G, terms, k] float32, as the reward models gave them."""


@dataclass(frozen=True, slots=True)
class Report:
    """The `guidance` object of a response."""

    method: str
    tokens: int
    guided_tokens: int
    interventions: int
    """Positions at which guidance changed the most likely token."""
    kl: float
    """Σ log π − log π₀ of the chosen tokens, nats, before temperature and top-p."""
    rewards: dict[str, float | None]
    """Each reward model's value after the last token; None where the last token was not scored."""
    reward_model_tokens: int
    policy_tokens: int
    error: str | None = None


def summarise(
    plan: Plan,
    records: Sequence[tuple[StepRecord, int]],
    reward_model_tokens: int,
    response: Sequence[int],
    error: str | None,
) -> Report:
    """Reads the records of the positions of `response`; later ones, computed ahead of a stop, are ignored."""
    used = records[: len(response)]
    guided, interventions, kl = 0, 0, 0.0
    last: dict[str, float | None] = {term.model: None for term in plan.rewards}
    if used:
        ids = _stack([record.ids[row] for record, row in used])
        base = _stack([record.base_logprobs[row] for record, row in used]).astype(np.float64)
        scores = base + np.where(np.isneginf(base), 0.0, _stack([record.bonus[row] for record, row in used]))
        guided_logprobs = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
        chosen = ids == np.asarray(response[: len(used)])[:, None]
        in_support = chosen.any(axis=1)
        column = chosen.argmax(axis=1)
        position = np.arange(len(used))
        gain = guided_logprobs[position, column] - base[position, column]
        guided = int(in_support.sum())
        kl = float(gain[in_support].sum())
        interventions = int((scores.argmax(axis=1) != base.argmax(axis=1)).sum())
        if len(used) == len(response) and in_support[-1]:
            record, row = used[-1]
            values = record.rewards[row, :, int(column[-1])].tolist()
            last = {term.model: value for term, value in zip(plan.rewards, values, strict=False)}
    return Report(plan.method, len(response), guided, interventions, kl, last, reward_model_tokens, 0, error)


def _stack(rows: list[torch.Tensor]) -> np.ndarray:
    width = max(len(row) for row in rows)
    if any(len(row) < width for row in rows):
        rows = [torch.nn.functional.pad(row, (0, width - len(row)), value=_padding(row)) for row in rows]
    return torch.stack(rows).cpu().numpy()


def _padding(row: torch.Tensor) -> float:
    return -torch.inf if row.is_floating_point() else -1
