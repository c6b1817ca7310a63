"""Preference rows: read, checked, and turned into token ids."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from steersman.training.fields import NUMBERS, RESPONSES, SEGMENTS, find_problems, with_prompt
from steersman.training.segments import SegmentedResponse, place_segments, scored_aspects
from steersman.training.sources import DataError, Row, read_rows

__all__ = ["DataError", "Preference", "TokenizedPreference", "load_preferences", "read_preferences", "tokenize"]


@dataclass(frozen=True)
class Preference:
    """One row; each of prompt and responses is text, or a list of chat messages ({"role", "content"}).

    The scores are a judge's of the two responses, `strength` (above 0) is how much better the chosen one is; segments
    are as `segments.py` has them.
    """

    prompt: Any
    chosen: Any
    rejected: Any
    where: str  # "FILE:LINE" or "FILE:row N"
    score_chosen: float | None = None
    score_rejected: float | None = None
    strength: float | None = None
    chosen_segments: list[dict[str, Any]] | None = None
    rejected_segments: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class TokenizedPreference:
    """Token ids; a response ends with the end token. None is what the row lacks, and segments nobody asked for."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    score_chosen: float | None = None
    score_rejected: float | None = None
    strength: float | None = None
    chosen_segments: SegmentedResponse | None = None
    rejected_segments: SegmentedResponse | None = None

    @property
    def longer(self) -> int:
        """The length in tokens of the longer response."""
        return max(len(self.chosen), len(self.rejected))


def load_preferences(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    *,
    needed: Collection[str] = (),
    aspects: Sequence[str] = (),
) -> list[TokenizedPreference]:
    """All rows of a file, folder or Hub dataset (`read_rows` says which); raises DataError on the first bad one.

    needed: names of numbers that every row must have: score_chosen, score_rejected, strength.
    aspects: if any, every row must have segments with a score for each of them.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end token: name one as eos_token in its tokenizer_config.json")
    rows, scored = [], None
    for row in read_preferences(source):
        for name in needed:
            if getattr(row, name) is None:
                raise DataError(f"{row.where}: '{name}' is missing, which this training needs in every row")
        if aspects:
            here = _aspects(row, aspects)
            if here != (scored := scored or here):
                raise DataError(f"{row.where}: aspects are {_listed(here)}, those of the rows before {_listed(scored)}")
        rows.append(tokenize(row, tokenizer, window, aspects))
    if not rows:
        raise DataError(f"{source}: no rows")
    return rows


def read_preferences(source: str | Path) -> Iterator[Preference]:
    """The rows of a source (`read_rows`), checked; raises DataError on the first bad one."""
    for row in read_rows(source):
        yield preference(row)


def preference(row: Row) -> Preference:
    """The row as a preference; raises DataError with the first of its problems."""
    for problem in [row.problem] if row.problem else find_problems(row.values):
        raise DataError(f"{row.where}: {problem}")
    optional = {name: row.values.get(name) for name in (*NUMBERS, *SEGMENTS)}
    return Preference(**with_prompt(row.values), where=row.where, **optional)


def tokenize(
    row: Preference, tokenizer: PreTrainedTokenizerBase, window: int, aspects: Sequence[str] = ()
) -> TokenizedPreference:
    """The row's token ids; no response may be longer than `window` together with its prompt.

    aspects: if any, the row's segments are read, with their scores in this order.
    """
    if isinstance(row.prompt, str):
        prompt = tokenizer(row.prompt)["input_ids"]
    else:
        prompt = tokenizer(_render(row, tokenizer, []), add_special_tokens=False)["input_ids"]
    texts = {name: _response_text(row, name, tokenizer) for name in RESPONSES}
    ids = {name: _response_ids(text, tokenizer) for name, text in texts.items()}
    for name in RESPONSES:
        if len(prompt) + len(ids[name]) > window:
            raise DataError(
                f"{row.where}: prompt and '{name}' have {len(prompt) + len(ids[name])} tokens, the window {window}"
            )
    optional: dict[str, Any] = {name: getattr(row, name) for name in NUMBERS}
    for response, name in zip(RESPONSES, SEGMENTS, strict=True):
        if aspects:
            try:
                placed = place_segments(getattr(row, name), texts[response], tokenizer, aspects)
            except DataError as error:
                raise DataError(f"{row.where}: '{name}': {error}") from None
            optional[name] = SegmentedResponse([*placed.ends[:-1], len(ids[response])], placed.scores)
    return TokenizedPreference(prompt, ids["chosen"], ids["rejected"], **optional)


def _aspects(row: Preference, needed: Sequence[str]) -> set[str]:
    """The aspects that both responses' segments are scored by, of which none that is needed may be missing."""
    for name in SEGMENTS:
        if getattr(row, name) is None:
            raise DataError(f"{row.where}: '{name}' is missing: `steersman data segment` adds it")
    scored = scored_aspects([*(row.chosen_segments or []), *(row.rejected_segments or [])])
    for aspect in needed:
        if aspect not in scored:
            raise DataError(f"{row.where}: segments have no score for '{aspect}': `steersman data annotate` adds it")
    return scored


def _response_text(row: Preference, field: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What follows the prompt, as a chat template writes it where the response is messages."""
    response = getattr(row, field)
    if isinstance(response, str):
        return response
    opening = _render(row, tokenizer, [])
    rendered = _render(row, tokenizer, response)
    if not rendered.startswith(opening):
        raise DataError(f"{row.where}: '{field}' changes how the chat template renders the prompt")
    return rendered[len(opening) :].rstrip()


def _response_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A response's ids up to and with its end token, which a chat template may have written already."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def _render(row: Preference, tokenizer: PreTrainedTokenizerBase, response: list[dict[str, str]]) -> str:
    try:
        return str(
            tokenizer.apply_chat_template([*row.prompt, *response], tokenize=False, add_generation_prompt=not response)
        )
    except Exception as error:  # templates are programs: they raise what they like
        reason = " ".join(str(error).split())
        raise DataError(f"{row.where}: the chat template refuses the messages: {reason}") from None


def _listed(aspects: set[str]) -> str:
    return ", ".join(sorted(aspects))
