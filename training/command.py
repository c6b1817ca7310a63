"""`steersman train`: one module for each kind of model trained, imported only when it is asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence

_KINDS = {
    "reward": ("steersman.training.reward", "a reward model, on whole responses or on prefixes"),
    "dpo": ("steersman.training.dpo", "a policy by direct preference optimisation, on responses or their beginnings"),
    "iterate": (
        "steersman.training.iterative.iterate",
        "a policy by rounds of sampling, scoring and 2D-DPO",
    ),
}


def main(argv: Sequence[str]) -> int:
    """Runs `steersman train KIND …`; returns its exit code."""
    return dispatch("train KIND --config FILE.yaml [flags over it]", "can't be trained", _KINDS, argv)


def dispatch(usage: str, refusal: str, modules: Mapping[str, tuple[str, str]], argv: Sequence[str]) -> int:
    """Runs the `main` of the module that the first argument names; returns its exit code.

    usage: what follows `steersman`, the command first. refusal: what is said of a name that isn't there.
    modules: by name, the module and a line about it.
    """
    if argv and argv[0] in modules:
        return int(importlib.import_module(modules[argv[0]][0]).main(argv[1:]))
    asked = not argv or argv[0] in ("-h", "--help")
    text = "\n".join([f"usage: steersman {usage}", "", *(f"  {n:10}{about}" for n, (_, about) in modules.items())])
    print(
        text if asked else f"steersman {usage.split()[0]}: {argv[0]!r} {refusal}\n{text}",
        file=None if asked else sys.stderr,
    )
    return 0 if asked and argv else 2
