"""Rows as they lie in a file, a folder or on the Hub, each with the place that a message about it names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow.parquet import ParquetFile

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_FILES = (".jsonl", ".json", ".parquet")


class DataError(ValueError):
    """Data that can't be trained on; the message names the file and the line, or row."""


@dataclass(frozen=True)
class Row:
    """One row as it was read; `where` is "FILE:LINE", or "FILE:row N" where there are no lines; both count from 1."""

    where: str
    values: dict[str, Any]
    problem: str = ""  # why it couldn't be read: `values` is empty then


def read_rows(source: str | Path) -> Iterator[Row]:
    """The rows of a source; raises DataError if it can't be opened. A row that can't be read has a `problem`.

    A source is a file of JSON lines, a Parquet file (`.parquet`), or what `datasets.load_dataset` knows: a folder or a
    Hub id. `SOURCE:SPLIT` names a split of the latter two, which is `train` otherwise, as in TRL.
    """
    path = Path(source)
    if path.is_file():
        return _read_parquet(path) if path.suffix == ".parquet" else _read_lines(path)
    name, split = re.fullmatch(r"(.*?)(?::([\w.-]+))?", str(source), re.DOTALL).groups()  # type: ignore[union-attr]
    if Path(name).is_dir() or (_HUB_ID.fullmatch(str(source)) and not name.endswith(_FILES)):
        return _read_dataset(name, split or "train")
    raise DataError(f"{source}: no such file")


def first_line(error: Exception) -> str:
    """What another library says is wrong, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_lines(path: Path) -> Iterator[Row]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _read_line(line, f"{path}:{number}")


def _read_line(line: bytes, where: str) -> Row:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Row(where, {}, f"not UTF-8: byte 0x{line[error.start]:02x} after {error.start} bytes of the line")
    except (ValueError, RecursionError) as error:
        return Row(where, {}, f"not JSON: {error}; a file of JSON lines has one object a line")
    if not isinstance(values, dict):
        return Row(where, {}, "a row is an object with the fields prompt, chosen, rejected")
    return Row(where, values)


def _read_parquet(path: Path) -> Iterator[Row]:
    number = 0
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path}:row {number}", _without_nulls(values))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}:row {number + 1}: not Parquet: {first_line(error)}") from None


def _read_dataset(name: str, split: str) -> Iterator[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(name, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{name}: split '{split}' can't be loaded: {first_line(error)}; SOURCE:SPLIT names another split, and "
            "`hf download --repo-type dataset` fetches a Hub dataset into a folder, which can be named instead"
        ) from None
    for number, values in enumerate(rows, 1):
        yield Row(f"{name}:row {number}", _without_nulls(values))


def _without_nulls(value: Any) -> Any:
    """Columnar formats write a field that is absent as a null."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
