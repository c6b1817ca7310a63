"""Presets: guidance under a name, which clients choose by `"guidance": "NAME"` or as the model `MODEL:NAME`."""

import re
from collections.abc import Collection, Mapping
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
    except (OSError, yaml.YAMLError) as error:
        raise ModelRefused(f"--guidance-presets {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping) or not content:
        raise ModelRefused(f"--guidance-presets {path}: give a mapping of names to guidance objects")
    return {str(name): _parse(path, name, value, loaded_rewards, loaded_policies) for name, value in content.items()}


def preset_of_model(model: Any, presets: Collection[str]) -> str | None:
    """The preset that a model name ends with, as in `MODEL:PRESET`."""
    if not isinstance(model, str):
        return None
    _, separator, name = model.rpartition(":")
    return name if separator and name in presets else None


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
