"""What a tokenizer makes of preference rows: lengths, and problems that only it can tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from steersman.training.data.fields import RESPONSES, SEGMENTS
from steersman.training.data.inspection import Finding, Lengths
from steersman.training.data.preferences import (
    Preference,
    check_length,
    check_tokenizer,
    load_tokenizer,
    preference,
    prompt_ids,
    response_ids,
    response_text,
    segmented,
)
from steersman.training.data.segments import scored_aspects
from steersman.training.data.sources import DataError, Row

T = TypeVar("T")

UNLIMITED = 10**9
"""What a tokenizer that knows no window says is at least this."""


class TokenInspector:
    """A checkpoint's tokenizer over rows that are right otherwise."""

    def __init__(self, path: str, window: int | None) -> None:
        """window: the tokenizer's own if None. Raises DataError if it can't be loaded."""
        self.path = path
        self._tokenizer = load_tokenizer(path)
        self.window = window or self._tokenizer.model_max_length
        special = {n for n, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        self._special = special | set(self._tokenizer.all_special_ids)
        self._refused = False

    def find_problems(self) -> Iterator[Finding]:
        """Of the tokenizer itself."""
        try:
            check_tokenizer(self._tokenizer)
        except DataError as error:
            yield "error", str(error).removeprefix(f"{self.path}: ")
        if self.window >= UNLIMITED:
            yield "warning", "the tokenizer names no window (model_max_length): --window does"

    def read(self, row: Row) -> tuple[list[Finding], Lengths | None]:
        """What is wrong with a row that `fields.find_problems` found nothing in, and its lengths in tokens."""
        checked = preference(row)
        if isinstance(checked.prompt, list) and self._tokenizer.chat_template is None:
            first, self._refused = not self._refused, True
            return [("error", "a row of messages, and the tokenizer has no chat template")] if first else [], None
        findings: list[Finding] = []

        def attempt(step: Callable[..., T], *arguments: Any) -> T | None:
            try:
                return step(*arguments)
            except DataError as error:
                finding: Finding = ("error", str(error).removeprefix(f"{row.where}: "))
                findings.extend([finding] if finding not in findings else [])
                return None

        prompt = attempt(prompt_ids, checked, self._tokenizer)
        texts = {name: attempt(response_text, checked, name, self._tokenizer) for name in RESPONSES}
        if prompt is None or None in texts.values():
            return findings, None
        ids = {name: response_ids(text or "", self._tokenizer) for name, text in texts.items()}
        for name, segments in zip(RESPONSES, SEGMENTS, strict=True):
            attempt(check_length, row.where, name, len(prompt) + len(ids[name]), self.window)
            if given := getattr(checked, segments):
                aspects = sorted(scored_aspects(given))
                attempt(segmented, checked, segments, texts[name], ids[name], self._tokenizer, aspects)
        findings += self._find_special(checked)
        return findings, (len(prompt), len(ids["chosen"]), len(ids["rejected"]))

    def _find_special(self, row: Preference) -> Iterator[Finding]:
        for name in ("prompt", *RESPONSES):
            value = getattr(row, name)
            contents = [value] if isinstance(value, str) else [message.get("content") or "" for message in value]
            for content in contents:
                ids = self._tokenizer(content, add_special_tokens=False)["input_ids"]
                ended = name != "prompt" and isinstance(value, str) and ids[-1:] == [self._tokenizer.eos_token_id]
                for token in sorted(self._special.intersection(ids[:-1] if ended else ids)):
                    text = self._tokenizer.convert_ids_to_tokens(token)
                    yield "warning", f"'{name}' holds the special token {text}"
