"""`steersman data`: what is done to preference data before it is trained on."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from steersman.training.command import dispatch
from steersman.training.data.sources import DataError

_ACTIONS = {
    "check": ("steersman.training.data.check", "say what is wrong with a file, line by line, before it is trained on"),
    "segment": ("steersman.training.data.segment", "cut responses into segments: sentences, code, tables, lists"),
    "annotate": ("steersman.training.data.annotate", "have a language model score every segment by aspect"),
}


def main(argv: Sequence[str]) -> int:
    """Runs `steersman data ACTION …`; returns its exit code, 2 for an error in what the user gave."""
    try:
        return dispatch("data ACTION …", "is nothing that is done to data", _ACTIONS, argv)
    except DataError as error:
        print(f"steersman data {argv[0]}: error: {error}", file=sys.stderr)
        return 2
