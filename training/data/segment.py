"""`steersman data segment`: preference rows whose responses are cut into segments, still without scores."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from steersman.training.data.fields import RESPONSES, SEGMENTS, check_row, response_text, with_prompt
from steersman.training.data.segmentation import cut_into_segments
from steersman.training.data.sources import DataError, Row, read_rows


def main(argv: Sequence[str]) -> int:
    """Runs `steersman data segment IN OUT`; raises DataError for what the user gave."""
    parser = argparse.ArgumentParser(
        "steersman data segment",
        description="Adds chosen_segments and rejected_segments to every row: sentences; code blocks, tables, lists "
        "and quotations whole. Segments that are there already stay.",
    )
    parser.add_argument("source", metavar="IN", help="JSON lines, Parquet, a folder or a Hub dataset")
    parser.add_argument("out", metavar="OUT", type=Path, help="JSON lines to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    arguments = parser.parse_args(argv)
    check_out(arguments.out)
    if arguments.out.exists() and not arguments.overwrite:
        raise DataError(f"{arguments.out}: is there already: --overwrite replaces it")
    rows = tqdm(read_rows(arguments.source), desc="rows", unit="")
    count = write_lines(arguments.out, (with_segments(row) for row in rows))
    print(f"{count} rows in {arguments.out}")
    return 0


def with_segments(row: Row) -> dict[str, Any]:
    """The row's fields with segments; raises DataError with the row's first problem."""
    check_row(row)
    values = row.values | with_prompt(row.values)
    for response, name in zip(RESPONSES, SEGMENTS, strict=True):
        if values.get(name) is None:
            text = response_text(values[response])
            if text is None:
                raise DataError(f"{row.where}: '{response}' is several messages: segments need a response of one")
            values[name] = [{"text": segment} for segment in cut_into_segments(text)]
    return values


def check_out(out: Path) -> None:
    """Raises DataError if JSON lines can't be written there."""
    if out.suffix == ".parquet":
        raise DataError(f"{out}: JSON lines are written: name it .jsonl")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise DataError(f"{out}: {'is a folder' if out.is_dir() else 'its folder does not exist'}")


def write_lines(out: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes rows as JSON lines; `out` changes once all of them are written, or not at all. Returns how many."""
    partial = out.with_name(f"{out.name}.part")
    count = 0
    try:
        # What UTF-8 can't say, half a surrogate pair in a field that nobody reads, stays JSON's escape of it.
        with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                count += 1
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return count
