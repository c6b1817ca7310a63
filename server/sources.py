"""What a request's prompt is made of, for reward models that read text rather than the base's tokens."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from steersman.guidance.request import GuidanceError
from steersman.guidance.text_form import Source


def completion_source(prompt: Any, index: int = 0) -> Source | None:
    """Of prompt `index` of a completion: its text, or None where it is token ids."""
    if isinstance(prompt, str):
        return Source(text=prompt)
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
        return Source(text=prompt[index])
    return None


def completion_prompts(prompt: Any) -> list[tuple[list[int], Source | None]]:
    """Every prompt of a completion: no ids and its text, or its token ids and None."""
    if not isinstance(prompt, list):
        return [] if prompt is None else [([], completion_source(prompt))]
    if prompt and isinstance(prompt[0], int):
        return [(prompt, None)]
    return [
        ([], completion_source(prompt, index)) if isinstance(part, str) else (part, None)
        for index, part in enumerate(prompt)
    ]


def chat_source(messages: Sequence[Any], continue_final: bool = False) -> Source:
    """Of a chat: its messages as plain data. With `continue_final` the last one is the beginning of the answer.

    Raises GuidanceError for content that is not text.
    """
    plain = [_plain_message(f"messages.{n}", message) for n, message in enumerate(messages)]
    if continue_final and plain:
        return Source(tuple(plain[:-1]), begun=plain[-1]["content"])
    return Source(tuple(plain))


def _plain_message(field: str, message: Any) -> dict[str, Any]:
    given = dict(message) if isinstance(message, Mapping) else message.model_dump(exclude_none=True)
    plain: dict[str, Any] = {"role": given["role"], "content": _plain_content(field, given.get("content"))}
    for name in ("name", "tool_call_id"):
        if given.get(name) is not None:
            plain[name] = given[name]
    if given.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(dict(call)) for call in given["tool_calls"]]
    return plain


def _plain_content(field: str, content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    # vLLM joins parts by newlines too, where a template takes text.
    return "\n".join(_plain_part(f"{field}.content.{n}", part) for n, part in enumerate(content))


def _plain_part(field: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise GuidanceError(field, "is not text, which is all that this request's reward model reads; leave it out")
    return text


def _plain_call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call as chat templates take it: its arguments are an object, not JSON."""
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments or "{}")
        except ValueError:
            function["arguments"] = arguments
    return {"id": call.get("id"), "type": "function", "function": function}
