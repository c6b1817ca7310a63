"""Preference data read to the end, with every problem in it: errors stop a training, warnings may spoil one."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from steersman.training.data.fields import NUMBERS, RESPONSES, SEGMENTS, find_problems, with_prompt
from steersman.training.data.segments import scored_aspects
from steersman.training.data.sources import Row

if TYPE_CHECKING:  # it takes seconds to import, and isn't always needed
    from steersman.training.data.token_inspection import TokenInspector

Finding = tuple[Literal["error", "warning"], str]
"""What is wrong with a row, and whether it would stop a training."""

Lengths = tuple[int, int, int]
"""Of prompt, chosen and rejected."""


@dataclass(frozen=True)
class Problem:
    """`where` is the row's place, or a file's or tokenizer's name."""

    where: str
    severity: Literal["error", "warning"]
    message: str


@dataclass
class Inspection:
    """What was found; `lengths`, in `unit`, are those of the rows that could be read."""

    unit: Literal["characters", "tokens"]
    rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    lengths: list[Lengths] = field(default_factory=list)

    def of(self, severity: Literal["error", "warning"]) -> list[Problem]:
        return [problem for problem in self.problems if problem.severity == severity]


def inspect(source: str, rows: Iterable[Row], tokens: TokenInspector | None = None) -> Inspection:
    """Reads all rows; with `tokens`, also by what a tokenizer makes of them."""
    found = Inspection("tokens" if tokens else "characters")
    if tokens:
        found.problems += [Problem(tokens.path, *finding) for finding in tokens.find_problems()]
    among = _AmongRows()
    for row in rows:
        found.rows += 1
        errors = [row.problem] if row.problem else list(find_problems(row.values))
        findings: list[Finding] = [("error", error) for error in errors]
        if not errors:
            texts = with_prompt(row.values)
            findings += [*_find_warnings(row.values, texts), *among.find(row, texts)]
            more, lengths = tokens.read(row) if tokens else ([], _count_characters(texts))
            findings += more
            found.lengths += [lengths] if lengths else []
        found.problems += [Problem(row.where, *finding) for finding in findings]
    found.problems += among.find_gaps()
    if not found.rows:
        found.problems.append(Problem(source, "error", "no rows"))
    return found


def _find_warnings(values: dict[str, Any], texts: dict[str, Any]) -> Iterator[Finding]:
    """What can be trained on but hardly is what was meant."""
    prompt, chosen, rejected = texts["prompt"], texts["chosen"], texts["rejected"]
    if chosen == rejected:
        yield "warning", "chosen and rejected are the same"
    given = values.get("prompt")
    if isinstance(given, str) and isinstance(chosen, list):
        if given not in [message.get("content") for message in prompt]:
            yield "warning", "'prompt' is not what chosen and rejected begin with, which is what counts"
    elif given and all(response[: len(given)] == given for response in (chosen, rejected)):
        yield "warning", "chosen and rejected repeat the prompt: leave the field 'prompt' out, or the repetition"
    for name in RESPONSES:
        if isinstance(texts[name], list) and texts[name][0]["role"] != "assistant":
            yield "warning", f"'{name}' begins with a message of role '{texts[name][0]['role']}'"
    better, worse = values.get("score_chosen"), values.get("score_rejected")
    if better is not None and worse is not None and better < worse:
        yield "warning", f"score_chosen is {better}, below score_rejected, {worse}"


class _AmongRows:
    """What is wrong with a row beside the rows before it."""

    def __init__(self) -> None:
        self._seen: dict[bytes, str] = {}
        self._kind: type | None = None
        self._aspects: set[str] = set()
        self._having: Counter[str] = Counter()
        self._lacking: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def find(self, row: Row, texts: dict[str, Any]) -> Iterator[Finding]:
        prompt, chosen, rejected = texts["prompt"], texts["chosen"], texts["rejected"]
        if chosen != rejected and (reverse := self._seen.get(_digest(prompt, rejected, chosen))):
            yield "warning", f"chosen and rejected are those of {reverse} the other way round"
        first = self._seen.setdefault(_digest(prompt, chosen, rejected), row.where)
        if first != row.where:
            yield "warning", f"the same as {first}"
        self._kind = self._kind or type(prompt)
        if type(prompt) is not self._kind:
            yield "warning", "text and messages in one file, which TRL and Parquet refuse"
        for name in SEGMENTS:
            if aspects := scored_aspects(row.values.get(name) or [{}]):
                self._aspects = self._aspects or aspects
                if aspects != self._aspects:
                    before, here = (", ".join(sorted(names)) for names in (self._aspects, aspects))
                    yield "error", f"the aspects of '{name}' are {here}, those of the rows before {before}"
            if row.values.get(name):
                self._count(f"scores in '{name}'", row.where, bool(aspects))
        for name in (*NUMBERS, *SEGMENTS):
            self._count(f"'{name}'", row.where, row.values.get(name) is not None)

    def find_gaps(self) -> Iterator[Problem]:
        """What some rows have and others don't: for each such thing the first row without it."""
        for name, lacking in self._lacking.items():
            having = self._having[name]
            if having or name.startswith("scores in"):
                message = f"{lacking} of {lacking + having} rows lack {name}, this the first"
                yield Problem(self._first[name], "warning", message)

    def _count(self, name: str, where: str, there: bool) -> None:
        (self._having if there else self._lacking)[name] += 1
        if not there:
            self._first.setdefault(name, where)


def _digest(*texts: Any) -> bytes:
    return hashlib.sha256(json.dumps(texts, sort_keys=True, default=str).encode()).digest()


def _count_characters(texts: dict[str, Any]) -> Lengths:
    def count(value: str | list[dict[str, Any]]) -> int:
        return len(value) if isinstance(value, str) else sum(len(message.get("content") or "") for message in value)

    return count(texts["prompt"]), count(texts["chosen"]), count(texts["rejected"])
