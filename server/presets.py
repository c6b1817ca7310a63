"""Presets: guidance under a name, which clients choose by `"guidance": "NAME"` or as the model `MODEL:NAME`."""

import re
from collections.abc import Collection, Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.request import Guidance, GuidanceError, parse_guidance, policies, reward_models

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What presets, and models that are loaded later, may be called."""


def load_presets(
    path: str | None, loaded_rewards: Collection[str], loaded_policies: Collection[str]
) -> dict[str, Guidance]:
    """The presets of a YAML file, name → guidance object; raises ModelRefused for one that could not be served."""
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ModelRefused(f"--guidance-presets {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping) or not content:
        raise ModelRefused(f"--guidance-presets {path}: give a mapping of names to guidance objects")
    return {str(name): _parse(path, name, value, loaded_rewards, loaded_policies) for name, value in content.items()}


def check_names(presets: Iterable[str], served: Iterable[str], others: Iterable[str]) -> None:
    """Raises ModelRefused if a preset would be served under a name that a model has already.

    served: names of the base model. others: names of its adapters.
    """
    names = {*served, *others}
    for model, preset in product(served, presets):
        if f"{model}:{preset}" in names:
            raise ModelRefused(f"--guidance-presets: a model is served as {model}:{preset} already; rename the preset")


def _parse(
    path: str, name: Any, value: Any, loaded_rewards: Collection[str], loaded_policies: Collection[str]
) -> Guidance:
    label = f"--guidance-presets {path}: {name}"
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ModelRefused(f"{label} is not a name: use letters, digits, '.', '_' and '-', at most 64 of them")
    try:
        guidance = parse_guidance(value)
    except GuidanceError as error:
        raise ModelRefused(f"{label}: {error}") from error
    for what, named, loaded in (
        ("reward model", reward_models(guidance), loaded_rewards),
        ("policy", policies(guidance), loaded_policies),
    ):
        for field, wanted in named:
            if wanted not in loaded:
                known = ", ".join(sorted(loaded)) or "none"
                raise ModelRefused(f"{label}: {field}: no {what} {wanted!r} is configured; configured are: {known}")
    return guidance
