"""`steersman train`: one module for each kind of model trained, imported only when it is asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

_KINDS = {
    "reward": ("steersman.training.reward", "a reward model, on whole responses or on prefixes"),
    "dpo": ("steersman.training.dpo", "a policy by direct preference optimisation, on responses or their beginnings"),
}


def main(argv: Sequence[str]) -> int:
    """Runs `steersman train KIND …`; returns its exit code."""
    if argv and argv[0] in _KINDS:
        return int(importlib.import_module(_KINDS[argv[0]][0]).main(argv[1:]))
    asked = not argv or argv[0] in ("-h", "--help")
    usage = "\n".join(["usage: steersman train KIND --config FILE.yaml [flags over it]", "", *_kinds()])
    print(
        usage if asked else f"steersman train: {argv[0]!r} can't be trained\n{usage}",
        file=None if asked else sys.stderr,
    )
    return 0 if asked and argv else 2


def _kinds() -> list[str]:
    return [f"  {name:10}{text}" for name, (_, text) in _KINDS.items()]
