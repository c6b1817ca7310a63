"""Preference rows: read from JSON lines, checked, and turned into token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

FIELDS = ("prompt", "chosen", "rejected")


class DataError(ValueError):
    """A row that can't be trained on; the message names its file and line."""


@dataclass(frozen=True)
class Preference:
    """One row; each field is text, or a list of chat messages ({"role", "content"})."""

    prompt: Any
    chosen: Any
    rejected: Any
    where: str  # "FILE:LINE"


@dataclass(frozen=True)
class TokenizedPreference:
    """Token ids; a response ends with the end token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def longer(self) -> int:
        """The length in tokens of the longer response."""
        return max(len(self.chosen), len(self.rejected))


def load_preferences(path: str | Path, tokenizer: PreTrainedTokenizerBase, window: int) -> list[TokenizedPreference]:
    """All rows of a JSON-lines file; raises DataError on the first bad one."""
    rows = [tokenize(row, tokenizer, window) for row in read_preferences(path)]
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def read_preferences(path: str | Path) -> Iterator[Preference]:
    """The rows of a JSON-lines file with the fields `prompt`, `chosen` and `rejected`."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file")
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _read_row(line, f"{path}:{number}")


def tokenize(row: Preference, tokenizer: PreTrainedTokenizerBase, window: int) -> TokenizedPreference:
    """The row's token ids; no response may be longer than `window` together with its prompt."""
    if isinstance(row.prompt, str):
        prompt = tokenizer(row.prompt)["input_ids"]
    else:
        prompt = tokenizer(_render(row, tokenizer, []), add_special_tokens=False)["input_ids"]
    chosen, rejected = (_response_ids(row, field, tokenizer) for field in ("chosen", "rejected"))
    for field, ids in (("chosen", chosen), ("rejected", rejected)):
        if len(prompt) + len(ids) > window:
            raise DataError(
                f"{row.where}: prompt and '{field}' have {len(prompt) + len(ids)} tokens, the window {window}"
            )
    return TokenizedPreference(prompt, chosen, rejected)


def _read_row(line: str, where: str) -> Preference:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row is an object with the fields {', '.join(FIELDS)}")
    for field in FIELDS:
        if field not in row:
            raise DataError(f"{where}: field '{field}' is missing")
        if not isinstance(row[field], type(row["prompt"])) or not isinstance(row[field], str | list):
            raise DataError(f"{where}: prompt, chosen and rejected are all text or all lists of messages")
        if not (row[field].strip() if isinstance(row[field], str) else row[field]):
            raise DataError(f"{where}: '{field}' is empty")
    return Preference(row["prompt"], row["chosen"], row["rejected"], where)


def _response_ids(row: Preference, field: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A response's ids up to and with its end token, which a chat template may have written already."""
    response = getattr(row, field)
    if not isinstance(response, str):
        opening = _render(row, tokenizer, [])
        rendered = _render(row, tokenizer, response)
        if not rendered.startswith(opening):
            raise DataError(f"{row.where}: '{field}' changes how the chat template renders the prompt")
        response = rendered[len(opening) :].rstrip()
    ids: list[int] = tokenizer(response, add_special_tokens=False)["input_ids"]
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def _render(row: Preference, tokenizer: PreTrainedTokenizerBase, response: list[dict[str, str]]) -> str:
    try:
        return str(
            tokenizer.apply_chat_template([*row.prompt, *response], tokenize=False, add_generation_prompt=not response)
        )
    except Exception as error:  # templates are programs: they raise what they like
        raise DataError(f"{row.where}: the chat template refuses the messages: {error}") from None
