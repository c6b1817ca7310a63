"""Preference rows: read, checked, and turned into token ids."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from steersman.training.data.fields import NUMBERS, RESPONSES, SEGMENTS, check_row, template_options, with_prompt
from steersman.training.data.segments import SegmentedResponse, place_segments, scored_aspects
from steersman.training.data.sources import DataError, Row, first_line, read_rows
from steersman.training.rewards.endings import ending_tokens, without_ending


@dataclass(frozen=True)
class Preference:
    """One row; each of prompt and responses is text, or a list of chat messages ({"role", "content"}).

    The scores are a judge's of the two responses, `strength` (above 0) is how much better the chosen one is; segments
    are as `segments.py` has them, `template_options` are passed on to the chat template.
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
    template_options: dict[str, Any] = field(default_factory=dict)


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
    check_tokenizer(tokenizer)
    rows = []
    scored: set[str] = set()
    for row in read_preferences(source):
        for name in needed:
            if getattr(row, name) is None:
                raise DataError(f"{row.where}: '{name}' is missing, which this training needs in every row")
        for name in SEGMENTS if aspects else ():
            here = _scored_aspects(row, name, aspects)
            if here != (scored := scored or here):
                before = ", ".join(sorted(scored))
                raise DataError(
                    f"{row.where}: aspects of '{name}' are {', '.join(sorted(here))}, those of the rows before {before}"
                )
        rows.append(tokenize(row, tokenizer, window, aspects))
    if not rows:
        raise DataError(f"{source}: no rows")
    return rows


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """A checkpoint's tokenizer; raises DataError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # broken files raise what the tokenizer's library likes
        raise DataError(f"{path} can't be loaded: {first_line(error)}") from None
    if tokenizer.eos_token is None and tokenizer.sep_token is not None:
        tokenizer.eos_token = tokenizer.sep_token  # what BERT and its kin end a text with
    return tokenizer


class Prompted(Protocol):
    """A row with a prompt, whatever else it has."""

    @property
    def prompt(self) -> Any:
        """Text or messages."""

    @property
    def where(self) -> str:
        """The place that a message about the row names."""

    @property
    def template_options(self) -> dict[str, Any]:
        """What is passed on to the chat template."""


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises DataError if responses can't be given an end."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{tokenizer.name_or_path}: the tokenizer has no end token: name one as eos_token in tokenizer_config.json"
        )


def read_preferences(source: str | Path) -> Iterator[Preference]:
    """The rows of a source (`read_rows`), checked; raises DataError on the first bad one."""
    for row in read_rows(source):
        yield preference(row)


def preference(row: Row) -> Preference:
    """The row as a preference; raises DataError with the first of its problems."""
    check_row(row)
    texts = with_prompt(row.values)
    optional: dict[str, Any] = {name: row.values.get(name) for name in (*NUMBERS, *SEGMENTS)}
    if isinstance(texts["prompt"], list):
        optional["template_options"] = template_options(row.values)
    return Preference(**texts, where=row.where, **optional)


def tokenize(
    row: Preference, tokenizer: PreTrainedTokenizerBase, window: int, aspects: Sequence[str] = ()
) -> TokenizedPreference:
    """The row's token ids; no response may be longer than `window` together with its prompt.

    aspects: if any, the row's segments are read, with their scores in this order.
    """
    prompt = prompt_ids(row, tokenizer)
    texts = {name: response_text(row, name, tokenizer) for name in RESPONSES}
    ids = {name: response_ids(text, tokenizer) for name, text in texts.items()}
    for name in RESPONSES:
        check_length(row.where, name, len(prompt) + len(ids[name]), window)
    optional: dict[str, Any] = {name: getattr(row, name) for name in NUMBERS}
    for response, name in zip(RESPONSES, SEGMENTS, strict=True):
        if aspects:
            optional[name] = segmented(row, name, texts[response], ids[response], tokenizer, aspects)
    return TokenizedPreference(prompt, ids["chosen"], ids["rejected"], **optional)


def _scored_aspects(row: Preference, name: str, needed: Sequence[str]) -> set[str]:
    """The aspects that a response's segments are scored by, of which none that is needed may be missing."""
    segments = getattr(row, name)
    if segments is None:
        raise DataError(f"{row.where}: '{name}' is missing: `steersman data segment` adds it")
    scored = scored_aspects(segments)
    for aspect in needed:
        if aspect not in scored:
            raise DataError(f"{row.where}: '{name}' has no scores for '{aspect}': `steersman data annotate` adds them")
    return scored


def prompt_ids(row: Prompted, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt's ids, up to where a chat template has the response begin; no end token closes them."""
    chat = not isinstance(row.prompt, str)
    text = _render(row, tokenizer, []) if chat else row.prompt
    ids: list[int] = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    return ids if chat else without_ending(ids, ending_tokens(tokenizer))


def response_text(row: Prompted, field: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What follows the prompt, as a chat template writes it where the response is messages."""
    response = getattr(row, field)
    if isinstance(response, str):
        return response
    opening = _render(row, tokenizer, [])
    rendered = _render(row, tokenizer, response)
    if not rendered.startswith(opening):
        raise DataError(f"{row.where}: '{field}' changes how the chat template renders the prompt")
    return rendered[len(opening) :].rstrip()


def response_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A response's ids up to and with its end token, which a chat template may have written already."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def check_length(where: str, field: str, length: int, window: int) -> None:
    if length > window:
        raise DataError(f"{where}: prompt and '{field}' have {length} tokens, the window {window}")


def segmented(
    row: Preference,
    field: str,
    text: str,
    ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    aspects: Sequence[str],
) -> SegmentedResponse:
    """The segments of a response whose text and ids are given; its end token belongs to the last of them."""
    try:
        placed = place_segments(getattr(row, field), text, tokenizer, aspects)
    except DataError as error:
        raise DataError(f"{row.where}: '{field}': {error}") from None
    return SegmentedResponse([*placed.ends[:-1], len(ids)], placed.scores)


def _render(row: Prompted, tokenizer: PreTrainedTokenizerBase, response: list[dict[str, str]]) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                [*row.prompt, *response],
                tokenize=False,
                add_generation_prompt=not response,
                **row.template_options,
            )
        )
    except Exception as error:  # templates are programs: they raise what they like
        reason = " ".join(str(error).split())
        raise DataError(f"{row.where}: the chat template refuses the messages: {reason}") from None
