"""Which of several responses is best and which worst, by their segments' scores (2D-DPO, iterative training)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steersman.training.configuration import ConfigError

_REDUCED: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda scores: scores.mean(),
    "minimum": lambda scores: scores.min(),
    "last": lambda scores: scores[-1],
}

PAPER = {
    "helpfulness": "mean",
    "correctness": "mean",
    "safety": "minimum",
    "completeness": "last",
    "clarity": "last",
}
"""How 2D-DPO reads one score of a response from its segments', for each of its aspects."""


def read_representatives(given: Any, aspects: Sequence[str]) -> dict[str, str]:
    """Aspect → mean, minimum or last, of each of `aspects`; from a mapping of YAML or, as flags have it, one in JSON.

    Raises ConfigError. Aspects of 2D-DPO need no mention.
    """
    try:
        own = json.loads(given) if isinstance(given, str) else given or {}
    except json.JSONDecodeError:
        own = None
    if not isinstance(own, dict) or not all(value in _REDUCED for value in own.values()):
        raise ConfigError(f"representatives is a mapping of aspects to {', '.join(_REDUCED)}, not {given!r}")
    both = PAPER | own
    if missing := [aspect for aspect in aspects if aspect not in both]:
        raise ConfigError(
            f"representatives: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} none of 2D-DPO's aspects: "
            f"say for each whether a response's score is its segments' {' or '.join(_REDUCED)}"
        )
    return {aspect: both[aspect] for aspect in aspects}


def represent(scores: Tensor, weights: Mapping[str, float], representatives: Mapping[str, str]) -> float:
    """One number for a response: the weighted sum over aspects of the score that represents its segments'.

    scores: [S, A], the aspects in the order of `weights`.
    """
    reduced = [_REDUCED[representatives[aspect]](scores[:, number]) for number, aspect in enumerate(weights)]
    return float(torch.stack(reduced).double() @ torch.tensor(list(weights.values()), dtype=torch.float64))
