"""What JSON must be like before anything reads it: UTF-8, finite numbers, and nesting that no reader trips over."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 100
"""Objects and arrays within one another; JSON schemas of tools stay far below."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_Path = tuple[str | int, ...]


class MalformedBody(ValueError):
    """A body that is refused with HTTP 400. `param` names the field where one can be named."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message if param is None else f"{param}: {message}")
        self.param = param


def check_json(body: bytes) -> None:
    """Raises MalformedBody for what is no JSON (RFC 8259), holds NaN or Infinity, or is nested too deeply."""
    value, finite = _parse(body)
    _check_depth(value)
    if not finite:
        path, number = next(_numbers_beyond(value, ()))
        raise MalformedBody(f"must be a finite number, got {number}", ".".join(map(str, path)) or None)
    if _SURROGATE.search(body):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise MalformedBody(
                "the body holds half of a surrogate pair (\\ud800 to \\udfff), which is no text"
            ) from None


def _parse(body: bytes) -> tuple[Any, bool]:
    """The value, and whether all of its numbers are finite: also 1e999 is not."""
    beyond: list[float] = []

    def read(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            beyond.append(number)
        return number

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=read, parse_float=read)
    except UnicodeDecodeError as error:
        raise MalformedBody(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise MalformedBody(f"the body is not JSON: {error}") from None
    return value, not beyond


def _check_depth(value: Any) -> None:
    level, depth = [value] if isinstance(value, dict | list) else [], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()
        level = [child for node in level for child in _children(node) if isinstance(child, dict | list)]


def _children(node: dict[str, Any] | list[Any]) -> Any:
    return node.values() if isinstance(node, dict) else node


def _too_deep() -> MalformedBody:
    return MalformedBody(f"the body is nested more than {MAX_DEPTH} levels deep")


def _numbers_beyond(value: Any, path: _Path) -> Iterator[tuple[_Path, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield path, value
    elif isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers_beyond(child, (*path, key))
