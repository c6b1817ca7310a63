"""`steersman data check`: all that is wrong with preference data, by line, before hours of training."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import binomtest
from tqdm import tqdm

from steersman.training.data.fields import NUMBERS, SEGMENTS, TEXTS
from steersman.training.data.inspection import Inspection, Problem, inspect
from steersman.training.data.sources import DataError, read_rows

if TYPE_CHECKING:
    from steersman.training.data.token_inspection import TokenInspector

EXAMPLES = 3
"""Problems of one kind that are shown with their places."""

_FIELD = "|".join((*TEXTS, *NUMBERS, *SEGMENTS))
_VALUES = re.compile(
    rf"\S+:(?:row )?\d+|'(?!(?:{_FIELD})')[^']*'|special token \S+|-?\d+(?:\.\d+)?(?:e[+-]?\d+)?|\bnan\b|\binf\b"
)
"""What differs in messages of one kind; the names of fields do not."""

PERCENTILES = (50, 90, 99, 100)

BIAS_SHARE, BIAS_PROBABILITY = 0.6, 0.01
"""Chosen is likely preferred for its length where it is the longer one in at least this share of the pairs, and that is
no accident by the sign test."""


def main(argv: Sequence[str]) -> int:
    """Runs `steersman data check FILE`; 1 if there are errors. Raises DataError if the file can't be opened."""
    parser = argparse.ArgumentParser(
        "steersman data check",
        description="Prints what is wrong with preference data, by kind, each with its first lines. Errors stop a "
        "training (exit code 1), warnings may spoil one.",
    )
    parser.add_argument("source", metavar="FILE", help="JSON lines, Parquet, a folder or a Hub dataset")
    parser.add_argument("--tokenizer", metavar="PATH", help="checkpoint to train, for what depends on its tokens")
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="tokens of a prompt and response: max_length of the training; default the tokenizer's",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every problem of every line")
    arguments = parser.parse_args(argv)
    if arguments.window is not None and (not arguments.tokenizer or arguments.window < 1):
        raise DataError(f"--window {arguments.window}: a number of tokens above 0, which --tokenizer counts")
    rows = read_rows(arguments.source)
    tokens = _load_tokens(arguments.tokenizer, arguments.window) if arguments.tokenizer else None
    found = inspect(arguments.source, tqdm(rows, desc="rows", unit=""), tokens)
    summary = summarise(found)
    print(json.dumps(_as_object(found, summary)) if arguments.json else _as_text(found, summary))
    return 1 if found.of("error") else 0


def _load_tokens(path: str, window: int | None) -> TokenInspector:
    from steersman.training.data.token_inspection import TokenInspector

    return TokenInspector(path, window)


def summarise(found: Inspection) -> dict[str, Any]:
    """Percentiles of the lengths, the share of pairs (of unequal length) whose chosen response is the longer one, and
    which of the two is likely to be preferred for its length: "chosen", "rejected" or None."""
    if not found.lengths:
        return {}
    lengths = np.array(found.lengths)
    percentiles = np.percentile(lengths, PERCENTILES, axis=0, method="higher")
    summary: dict[str, Any] = {
        name: {f"p{p}" if p < 100 else "longest": int(at) for p, at in zip(PERCENTILES, column, strict=True)}
        for name, column in zip(("prompt", "chosen", "rejected"), percentiles.T, strict=True)
    }
    longer, shorter = (lengths[:, 1] > lengths[:, 2]).sum(), (lengths[:, 1] < lengths[:, 2]).sum()
    if unequal := int(longer + shorter):
        share = float(longer / unequal)
        biased = max(share, 1 - share) >= BIAS_SHARE and binomtest(int(longer), unequal).pvalue < BIAS_PROBABILITY
        summary["chosen_longer"] = share
        summary["length_bias"] = ("chosen" if share > 0.5 else "rejected") if biased else None
    return summary


def _as_object(found: Inspection, summary: dict[str, Any]) -> dict[str, Any]:
    return {
        "rows": found.rows,
        "errors": len(found.of("error")),
        "warnings": len(found.of("warning")),
        "problems": [asdict(problem) for problem in found.problems],
        "unit": found.unit,
        **summary,
    }


def group(problems: Sequence[Problem]) -> list[list[Problem]]:
    """Problems of one kind together, errors first, in the order in which each kind was met first.

    Of one kind are messages that differ in numbers, in the places of other rows, or in what a row holds.
    """
    kinds: dict[tuple[str, str], list[Problem]] = {}
    for problem in sorted(problems, key=lambda problem: problem.severity != "error"):
        kinds.setdefault((problem.severity, _VALUES.sub("…", problem.message)), []).append(problem)
    return list(kinds.values())


def _as_lines(kind: Sequence[Problem]) -> list[str]:
    """All of a few problems; of many the first, and how many there are."""
    shown = kind if len(kind) <= EXAMPLES else kind[:EXAMPLES]
    lines = [f"{problem.where}: {problem.severity}: {problem.message}" for problem in shown]
    if left := len(kind) - len(shown):
        lines.append(f"  and {left} more {kind[0].severity}s of this kind, {len(kind)} in all (--json lists every one)")
    return lines


def _as_text(found: Inspection, summary: dict[str, Any]) -> str:
    lines = [line for kind in group(found.problems) for line in _as_lines(kind)]
    for name in ("prompt", "chosen", "rejected"):
        if name in summary:
            numbers = ", ".join(f"{number} {key}" for key, number in summary[name].items())
            lines.append(f"{name}: {numbers} ({found.unit})")
    if "chosen_longer" in summary:
        bias = summary["length_bias"]
        verdict = f"length bias is likely: the {bias} ones are longer" if bias else "no length bias to be seen"
        lines.append(f"chosen is the longer one in {summary['chosen_longer']:.0%} of the pairs: {verdict}")
    lines.append(f"{found.rows} rows, {len(found.of('error'))} errors, {len(found.of('warning'))} warnings")
    return "\n".join(lines)
