"""A language model as judge: what it is asked, how its answer is read, and what it has answered before.

One prompt asks for one aspect of all segments of one response (2D-DPO, §3.1). The prompts are the files of `prompts/`:
`frame.md`, and one `ASPECT.md` for each aspect.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, Literal

from openai import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    AuthenticationError,
    NotFoundError,
    OpenAIError,
    PermissionDeniedError,
)
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from steersman.training.data.sources import DataError, first_line

PROMPTS = Path(__file__).parent / "prompts"
ASKS = 3
"""How often the judge is asked for one answer until it can be read."""

QUOTED = 1000
"""Characters of an answer that are sent back with what is wrong: one that never ended would fill the window."""


class Unanswered(Exception):
    """A question that the judge has no usable answer to."""


@dataclass(frozen=True)
class Question:
    """The scores of one response's segments for one aspect."""

    prompt: str
    segments: int


@dataclass
class Usage:
    """Tokens as the endpoint counted them."""

    prompt: int = 0
    answer: int = 0


class _Score(BaseModel):
    model_config = ConfigDict(extra="forbid")
    segment: int
    score: Literal[0, 1, 2, 3, 4]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    segments: list[_Score]


_FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "scores", "strict": True, "schema": _Answer.model_json_schema()},
}


class Templates:
    """The prompts: files of a folder, and of `prompts/` for what it doesn't have."""

    def __init__(self, folder: Path | None, aspects: Sequence[str]) -> None:
        """Reads them; raises DataError for an aspect without one."""
        self._frame = Template(_read("frame", folder))
        self._rubrics = {aspect: _read(aspect, folder).strip() for aspect in aspects}
        try:
            self.question("", [""], aspects[0])
        except (KeyError, ValueError) as error:
            raise DataError(f"frame.md: {error} is no placeholder; $$ writes a dollar sign") from None

    def question(self, conversation: str, segments: Sequence[str], aspect: str) -> Question:
        listed = [json.dumps({"segment": n, "text": text}, ensure_ascii=False) for n, text in enumerate(segments, 1)]
        prompt = self._frame.substitute(
            aspect=aspect,
            rubric=self._rubrics[aspect],
            count=len(segments),
            conversation=conversation,
            segments="\n".join(listed),
        )
        return Question(prompt, len(segments))


class Answers:
    """Answers kept on disk, by model and prompt: each as soon as it is there, whatever happens afterwards."""

    def __init__(self, path: Path, model: str) -> None:
        """Opens the file, or makes it; raises DataError if it is something else."""
        self._model = model
        try:
            self._file = sqlite3.connect(path)
            self._file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, scores TEXT NOT NULL)")
        except sqlite3.Error as error:
            raise DataError(f"{path}: not a file of answers: {error}") from None

    def __getitem__(self, question: Question) -> list[int] | None:
        """The scores, or None where there is no answer yet."""
        found = self._file.execute("SELECT scores FROM answers WHERE key = ?", (self._key(question),)).fetchone()
        return json.loads(found[0]) if found else None

    def __setitem__(self, question: Question, scores: Sequence[int]) -> None:
        with self._file:
            self._file.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?)", (self._key(question), json.dumps(scores))
            )

    def _key(self, question: Question) -> str:
        return hashlib.sha256(json.dumps([self._model, question.prompt]).encode()).hexdigest()


class Judge:
    """A model behind an OpenAI-compatible endpoint."""

    def __init__(self, client: AsyncOpenAI, model: str, temperature: float | None) -> None:
        """temperature: None leaves it to the endpoint."""
        self._client = client
        self._options: dict[str, Any] = {"model": model, "response_format": _FORMAT}
        if temperature is not None:
            self._options["temperature"] = temperature
        self.usage = Usage()

    async def ask(self, question: Question) -> list[int]:
        """The scores; raises Unanswered, or DataError where asking anything more is pointless.

        The client retries what may pass (429, 5xx, timeouts) with its own growing pauses. An answer that can't be read
        is answered with what is wrong with it.
        """
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": question.prompt}]
        for _ in range(ASKS):
            text = await self._complete(messages)
            try:
                return _read_scores(text, question.segments)
            except ValueError as error:
                problem = str(error)
            if text:
                messages = [
                    {"role": "user", "content": question.prompt},
                    {"role": "assistant", "content": text[:QUOTED]},
                    {"role": "user", "content": f"That can't be read: {problem} Answer with the JSON object alone."},
                ]
        raise Unanswered(f"no readable answer in {ASKS} attempts: {problem}")

    async def _complete(self, messages: list[ChatCompletionMessageParam]) -> str:
        try:
            completion = await self._client.chat.completions.create(messages=messages, **self._options)
        except (AuthenticationError, PermissionDeniedError, NotFoundError) as error:
            raise DataError(f"the judge refuses every request: {first_line(error)}") from None
        except (APITimeoutError, APIStatusError) as error:
            raise Unanswered(first_line(error)) from None
        except APIConnectionError:
            raise DataError(f"no judge at {self._client.base_url}; every answer so far is kept") from None
        except (OpenAIError, ValueError):  # a body that isn't JSON
            return ""
        if not isinstance(completion, ChatCompletion) or not completion.choices:
            return ""
        if completion.usage:
            self.usage.prompt += completion.usage.prompt_tokens
            self.usage.answer += completion.usage.completion_tokens
        return completion.choices[0].message.content or ""


async def ask_all(
    judge: Judge, questions: Sequence[Question], answers: Answers, concurrency: int
) -> dict[Question, str]:
    """Asks and keeps the answers, `concurrency` at a time; returns what failed, and why. Raises DataError."""
    failures = {}
    waiting = iter(questions)
    with tqdm(total=len(questions), desc="answers", unit="") as bar:

        async def work() -> None:
            for question in waiting:
                try:
                    answers[question] = await judge.ask(question)
                except Unanswered as error:
                    failures[question] = str(error)
                bar.update()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(work())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
    return failures


def _read_scores(text: str, count: int) -> list[int]:
    """The scores in an answer; raises ValueError with what is wrong with it."""
    if not text:
        raise ValueError("there is no text.")
    try:
        entries = _Answer.model_validate_json(text).segments
    except ValidationError as error:
        raise ValueError(f"{error.errors()[0]['msg']}.") from None
    if [entry.segment for entry in entries] != list(range(1, count + 1)):
        raise ValueError(f"there are entries for {len(entries)} segments, not for 1 to {count} in their order.")
    return [entry.score for entry in entries]


def _read(name: str, folder: Path | None) -> str:
    for place in (folder, PROMPTS):
        if place and (place / f"{name}.md").is_file():
            return (place / f"{name}.md").read_text(encoding="utf-8")
    raise DataError(f"there is no prompt for '{name}': write {name}.md and name its folder by --prompts")
