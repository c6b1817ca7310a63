"""Reward models with one output for every aspect (2D-DPO's), which the weights that they carry make one reward."""

import math
from pathlib import Path
from typing import Any

import torch

from steersman.guidance.checkpoints import ModelRefused, find_head

ASPECTS = "aspects"
"""The kind that steersman's trainer writes into such a checkpoint's config."""


def require_aspects(path: str | Path, label: str, config: Any) -> None:
    """Refuses a checkpoint that does not say what each of its outputs is and weighs."""
    aspects, weights = config.steersman.get("aspects"), config.steersman.get("weights")
    if not isinstance(aspects, list) or not isinstance(weights, list) or not all(map(_is_number, weights)):
        raise ModelRefused(
            f"{label}: {path} says that it scores aspects: its config.json needs steersman.aspects, their names, and "
            "steersman.weights, a number for each"
        )
    if not len(aspects) == len(weights) == config.num_labels:
        raise ModelRefused(
            f"{label}: {path} has {config.num_labels} outputs, but {len(aspects)} steersman.aspects and {len(weights)} "
            "steersman.weights in its config.json: each output is one aspect and has one weight"
        )


def weigh_outputs(model: Any) -> None:
    """Makes one output of all, Σ_a weight_a · output_a, by the weights in the model's config; in place."""
    head = find_head(model)
    if not isinstance(head, torch.nn.Linear):
        raise ModelRefused(f"{type(model).__name__} has a {type(head).__name__} as head; aspects need a linear one")
    weights = torch.tensor(model.config.steersman["weights"], dtype=torch.float32, device=head.weight.device)
    for name in ("weight", "bias"):
        own = getattr(head, name, None)
        if own is not None:
            weighed = torch.tensordot(weights, own.detach().float(), dims=1).unsqueeze(0)
            setattr(head, name, torch.nn.Parameter(weighed.to(own.dtype), requires_grad=False))
    head.out_features = 1
    model.config.num_labels = model.num_labels = 1


def describe_aspects(config: Any) -> dict[str, Any]:
    """Aspect → weight, for users; nothing for another kind of model."""
    facts = getattr(config, "steersman", None) or {}
    if facts.get("kind") != ASPECTS:
        return {}
    return {"aspects": dict(zip(facts["aspects"], facts["weights"], strict=True))}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
