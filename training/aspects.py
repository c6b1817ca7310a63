"""Aspects that segments are scored by, and what each weighs in a segment's reward."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from steersman.training.configuration import ConfigError
from steersman.training.data.segments import ASPECTS
from steersman.training.policies.losses import WEIGHTS

PAPER = dict(zip(ASPECTS, WEIGHTS, strict=True))
"""2D-DPO's five aspects and weights."""


def read_weights(given: Any, default: Mapping[str, float] = PAPER) -> dict[str, float]:
    """Aspect → weight, from a mapping of YAML or, as flags have it, one in JSON; raises ConfigError.

    A weight is at least 0, and one is above: a segment's reward, by which selected log-ratios are scaled, is positive.
    """
    if given is None:
        return dict(default)
    try:
        weights = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError:
        weights = None
    if not isinstance(weights, dict) or not weights or not all(_is_weight(value) for value in weights.values()):
        raise ConfigError(f"weights is a mapping of aspects to numbers of at least 0, not {given!r}")
    if not any(weights.values()):
        raise ConfigError("weights: one of them is above 0")
    return {str(aspect): float(weight) for aspect, weight in weights.items()}


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
