"""What a preference row's fields must hold, whatever the tokenizer, and every way in which they may not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from steersman.training.data.segments import find_segment_problems
from steersman.training.data.sources import DataError, Row

TEXTS = ("prompt", "chosen", "rejected")
RESPONSES = ("chosen", "rejected")
NUMBERS = ("score_chosen", "score_rejected", "strength")
SEGMENTS = ("chosen_segments", "rejected_segments")


def find_problems(values: dict[str, Any]) -> Iterator[str]:
    """All that is wrong with a row; nothing where it can be trained on. A null is a field that isn't there."""
    problems = list(_find_text_problems(values))
    yield from problems
    for name in NUMBERS:
        if values.get(name) is not None:
            yield from find_number_problems(name, values[name])
    texts = values if problems else with_prompt(values)
    for response, name in zip(RESPONSES, SEGMENTS, strict=True):
        if values.get(name) is not None and response in texts:
            text = response_text(texts[response])
            yield from find_segment_problems(name, values[name], text)


def check_row(row: Row) -> None:
    """Raises DataError with the row's first problem."""
    for problem in [row.problem] if row.problem else find_problems(row.values):
        raise DataError(f"{row.where}: {problem}")


def with_prompt(values: dict[str, Any]) -> dict[str, Any]:
    """The row's prompt and responses, by TRL's rule: where chosen and rejected hold the whole conversation, the prompt
    is what they share.

    Messages are shared whole, text to the character. Raises ValueError where they share nothing.
    """
    if "prompt" in values and isinstance(values["prompt"], type(values["chosen"])):
        return {name: values[name] for name in TEXTS}
    from trl.data_utils import extract_prompt  # which takes seconds to import, and most rows have a prompt

    row: dict[str, Any] = extract_prompt({name: values[name] for name in RESPONSES})
    # TRL's function answers with something else where the first characters or messages differ.
    if not row["prompt"] or any(row["prompt"] + row[name] != values[name] for name in RESPONSES):
        raise ValueError("chosen and rejected begin differently: without a prompt of their kind, both begin with it")
    return row


def template_options(values: dict[str, Any]) -> dict[str, Any]:
    """What a row of messages passes on to the chat template, as in TRL: the fields `tools` (or its JSON) and
    `chat_template_kwargs`. Raises ValueError."""
    tools, more = values.get("tools"), values.get("chat_template_kwargs") or {}
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise ValueError(f"'tools' is not JSON: {error}") from None
    if not isinstance(tools, list | None) or not isinstance(more, dict):
        raise ValueError("'tools' is a list, 'chat_template_kwargs' an object")
    return {"tools": tools, **more}


def response_text(response: Any) -> str | None:
    """What segments cut up: the response's text, or its only message's; None where there is no such thing."""
    if isinstance(response, list) and len(response) == 1 and isinstance(response[0], dict):
        response = response[0].get("content")
    return response if isinstance(response, str) else None


def _find_text_problems(row: dict[str, Any]) -> Iterator[str]:
    values = {name: row[name] for name in TEXTS if row.get(name) is not None}
    missing = [name for name in RESPONSES if name not in values]
    yield from (f"field '{name}' is missing" for name in missing)
    problems: list[str] = []
    for name, value in values.items():
        problems += find_value_problems(name, value)
    yield from problems
    if missing or problems:
        return
    kinds = {name: type(value) for name, value in values.items()}
    if kinds["chosen"] != kinds["rejected"] or (kinds.get("prompt") is list and kinds["chosen"] is str):
        yield "prompt, chosen and rejected are all text or all lists of messages, not of different kinds"
        return
    try:
        texts = with_prompt(values)
        if isinstance(texts["prompt"], list):
            template_options(row)
    except ValueError as error:
        yield str(error)
        return
    yield from (f"'{name}' is empty after the prompt" for name in RESPONSES if _is_empty(texts[name]))


def find_value_problems(name: str, value: Any) -> Iterator[str]:
    """What is wrong with a prompt or a response."""
    if not isinstance(value, str | list):
        yield f"'{name}' is {value!r:.40}: prompt, chosen and rejected are all text or all lists of messages"
    elif _is_empty(value):
        yield f"'{name}' is empty"
    elif isinstance(value, str):
        yield from _find_letter_problems(f"'{name}'", value)
    else:
        for number, message in enumerate(value, 1):
            yield from _find_message_problems(f"message {number} of '{name}'", message)


def _find_message_problems(name: str, message: Any) -> Iterator[str]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        yield f"{name} is not an object with a role and a content"
    elif isinstance(message.get("content"), str):
        yield from _find_letter_problems(name, message["content"])
    elif "tool_calls" not in message or message.get("content") is not None:
        yield f"{name} has a content that is not text"


def _find_letter_problems(name: str, text: str) -> Iterator[str]:
    """JSON can write half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        yield f"{name} holds {text[error.start]!r}, which is half a character"


def find_number_problems(name: str, value: Any) -> Iterator[str]:
    """What is wrong with a number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        yield f"'{name}' is {value!r:.40}, not a finite number"
    elif name == "strength" and value <= 0:
        yield f"'strength' is {value!r}: how much better chosen is, above 0"


def _is_empty(value: Any) -> bool:
    """Whether a text is, or a list has no message that says or calls something."""
    if isinstance(value, list):
        return not any(not isinstance(m, dict) or m.get("tool_calls") or not _is_empty(m.get("content")) for m in value)
    return isinstance(value, str) and not value.strip()
