"""Fields of a request body that vLLM would pass over although their sender counts on them: guidance in a wrong place or
under a misspelt name, arguments of a client that are no fields, and integers that no worker can be sent."""

import re
from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

from steersman.guidance.request import GuidanceError
from steersman.server.config import CONFIG_KEY

FIELD = "guidance"
LEAST_INTEGER, MOST_INTEGER = -(2**63), 2**64 - 1
"""What fits the 64 bits in which integers travel to the workers."""

_ARGUMENTS = {"extrabody", "extraquery", "extraheaders"}
"""Arguments of OpenAI's Python client, which puts their content elsewhere before it sends a request."""
_METADATA = "metadata"
_CLIENTS_OWN = {
    *("prompt", "tokens", "token_ids", "tools", "functions", "arguments", "documents"),
    *("schema", "json_schema", "json", "guided_json"),
}
"""Fields whose content is the client's own data, in which any name and any number may stand."""
_ALIKE = 0.8
"""Of 1: "guidence" and "gudiance" are 0.88 of "guidance", "guided" 0.71."""

_Path = tuple[str | int, ...]


def check_fields(body: dict[str, Any], taken_here: str) -> None:
    """Raises GuidanceError for the first field that would be lost or could not be sent.

    taken_here: how the route that was asked takes guidance, for the error's way out.
    """
    fields = list(_walk(body, ()))
    for path, value in fields:
        if path != (FIELD,) and value is not None and _names_guidance(path):
            raise GuidanceError(_dotted(path), _explain(path, taken_here))
    for name, value in body.items():
        if value and _letters(name) in _ARGUMENTS:
            raise GuidanceError(
                name,
                "is an argument of OpenAI's Python client and no field: what it holds would be passed over; send that "
                f"at the top level of the body. {taken_here}",
            )
    for path, value in fields:
        if path[0] != FIELD and isinstance(value, int) and not LEAST_INTEGER <= value <= MOST_INTEGER:
            raise GuidanceError(_dotted(path), f"must lie within -2**63 and 2**64 - 1, got {value!r:.80}")


def check_outside_body(query: Iterable[str], headers: Iterable[str], taken_here: str) -> None:
    """Raises GuidanceError for guidance in the names of a query string or of headers."""
    for where, names in (("query string", query), ("headers", headers)):
        for name in names:
            if resembles_guidance(name.partition("[")[0].lower().removeprefix("x-")):
                raise GuidanceError(name, f"guidance in the {where} would be passed over. {taken_here}")


@lru_cache(maxsize=4096)
def resembles_guidance(name: str) -> bool:
    """Whether a field is called "guidance" but for case, punctuation or a slip of the fingers."""
    letters = _letters(name)
    if not 6 <= len(letters) <= 11:
        return False
    return SequenceMatcher(None, letters, FIELD).ratio() >= _ALIKE


def _names_guidance(path: _Path) -> bool:
    name = path[-1]
    if not isinstance(name, str) or len(name) > 64:
        return False
    return resembles_guidance(name) or (name.lower() == CONFIG_KEY and _METADATA not in path)


def _explain(path: _Path, taken_here: str) -> str:
    if str(path[-1]).lower() == CONFIG_KEY:
        return f"is the server's own and cannot be set. {taken_here}"
    if len(path) == 1:
        return f'is not a field and would be passed over: it is called "{FIELD}". {taken_here}'
    return f'would be passed over here: "{FIELD}" stands at the top level of the body. {taken_here}'


def _walk(value: Any, path: _Path) -> Iterator[tuple[_Path, Any]]:
    """Every field and element outside of the client's own data and of guidance in its right place, outermost first."""
    children = value.items() if isinstance(value, dict) else enumerate(value)
    deeper: list[tuple[_Path, Any]] = []
    for name, child in children:
        below = (*path, name)
        # `input` is a list of messages in one API, what a tool is called with in another.
        own = name in _CLIENTS_OWN or below == (FIELD,) or (name == "input" and isinstance(child, dict))
        if isinstance(name, str) or isinstance(child, int):
            yield below, child
        if isinstance(child, dict | list) and not own:
            deeper.append((below, child))
    for below, child in deeper:
        yield from _walk(child, below)


def _letters(name: str) -> str:
    return re.sub("[^a-z]", "", name[:64].lower())


def _dotted(path: _Path) -> str:
    return ".".join(str(part)[:64] for part in path)
