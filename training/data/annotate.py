"""`steersman data annotate`: segments scored by aspect, by a language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI
from tqdm import tqdm

from steersman.training.data.fields import SEGMENTS, check_row, with_prompt
from steersman.training.data.judge import Answers, Judge, Question, Templates, Usage, ask_all
from steersman.training.data.segment import check_out, write_lines
from steersman.training.data.segments import ASPECTS
from steersman.training.data.sources import DataError, Row, read_rows

RETRIES = 6
"""Of the client, after half a second, then twice as long each time up to 8, or as the endpoint says."""

LETTERS_PER_TOKEN = 4
TOKENS_PER_SCORE = 12


@dataclass(frozen=True)
class Place:
    """What an answer is for."""

    row: int
    field: str
    aspect: str


def main(argv: Sequence[str]) -> int:
    """Runs `steersman data annotate IN OUT`; 1 if rows are left without scores. Raises DataError."""
    arguments = _parse(argv)
    rows = _read(arguments.source)
    in_out = _take_over(rows, arguments)
    questions = _find_questions(rows, Templates(arguments.prompts, arguments.aspects), arguments.aspects)
    answers = Answers(_answers_file(arguments), arguments.judge)
    pending = [question for question in dict.fromkeys(questions.values()) if answers[question] is None]
    print(_describe(len(rows), len(set(questions.values())), pending, arguments), flush=True)
    if arguments.dry_run:
        return 0
    if pending and not arguments.yes:
        _confirm()
    try:
        failures = asyncio.run(_ask(pending, answers, arguments)) if pending else {}
    except KeyboardInterrupt:
        print("\nstopped: every answer so far is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    failed = _fill(rows, questions, answers)
    _report(rows, questions, failures)
    # A row of OUT stays, with the scores it has, if what was asked for in addition failed.
    written = [row.values for number, row in enumerate(rows) if number in in_out or number not in failed]
    if written:
        write_lines(arguments.out, written)
        print(f"{len(written)} of {len(rows)} rows in {arguments.out}")
    if failed:
        print(f"{len(failed)} of {len(rows)} rows failed: the same command asks for them alone", file=sys.stderr)
    return 1 if failed else 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "steersman data annotate",
        description="Has a model score every segment from 0 to 4 by aspect, one request for each response and aspect. "
        "A row that is in OUT already, or an answer in the answers' file, is not asked for again.",
    )
    parser.add_argument("source", metavar="IN", help="rows with segments, from steersman data segment")
    parser.add_argument("out", metavar="OUT", type=Path, help="JSON lines to write")
    parser.add_argument("--base-url", required=True, help="the endpoint, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--judge", required=True, metavar="MODEL", help="the model's name there")
    parser.add_argument(
        "--aspects", type=_names, default=list(ASPECTS), metavar="A,B,…", help=f"default {','.join(ASPECTS)}"
    )
    parser.add_argument("--prompts", type=Path, metavar="FOLDER", help="frame.md and ASPECT.md used instead of our own")
    parser.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable; default OPENAI_API_KEY if it is set"
    )
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at once; default 8")
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        help="default 0; 'default' leaves it to the endpoint, as some models require",
    )
    parser.add_argument("--answers", type=Path, metavar="FILE", help="answers kept on disk; default OUT.answers")
    parser.add_argument(
        "--price-per-million-tokens",
        type=_prices,
        metavar="IN,OUT",
        help="what a million prompt and a million answer tokens cost, as in 0.5,1.5",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what it would cost, and ask nothing")
    parser.add_argument("--yes", action="store_true", help="go on without a question about the cost")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, also rows of it that IN doesn't have")
    arguments = parser.parse_args(argv)
    check_out(arguments.out)
    if arguments.concurrency < 1:
        raise DataError(f"--concurrency is at least 1, not {arguments.concurrency}")
    if arguments.api_key_env and arguments.api_key_env not in os.environ:
        raise DataError(f"--api-key-env {arguments.api_key_env}: there is no such environment variable")
    return arguments


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _temperature(text: str) -> float | None:
    return None if text == "default" else float(text)


def _prices(text: str) -> tuple[float, float]:
    per_prompt, per_answer = text.split(",")
    return float(per_prompt), float(per_answer)


def _read(source: str) -> list[Row]:
    rows = []
    for row in tqdm(read_rows(source), desc="rows", unit=""):
        check_row(row)
        for name in SEGMENTS:
            if row.values.get(name) is None:
                raise DataError(f"{row.where}: '{name}' is missing: `steersman data segment` adds it")
        rows.append(row)
    if not rows:
        raise DataError(f"{source}: no rows")
    return rows


def _take_over(rows: Sequence[Row], arguments: argparse.Namespace) -> set[int]:
    """Scores that OUT has go into the rows; returns the numbers of those it has. Raises DataError if it has rows that
    would be lost."""
    if arguments.overwrite or not arguments.out.exists():
        return set()
    known = {}
    for row in read_rows(arguments.out):
        check_row(row)
        known[_identity(row.values)] = row.values
    found = {number: identity for number, row in enumerate(rows) if (identity := _identity(row.values)) in known}
    if lost := known.keys() - found.values():
        raise DataError(f"{arguments.out}: {len(lost)} of its rows are not in IN: --overwrite drops them")
    for number, identity in found.items():
        for name in SEGMENTS:
            for segment, scored in zip(rows[number].values[name], known[identity][name], strict=True):
                segment["scores"] = scored.get("scores", {}) | segment.get("scores", {})
    return set(found)


def _identity(values: Mapping[str, Any]) -> str:
    """The row without scores."""
    bare = {name: [segment["text"] for segment in values[name]] for name in SEGMENTS if values.get(name)}
    return json.dumps({**values, **bare}, sort_keys=True, default=str)


def _find_questions(rows: Sequence[Row], templates: Templates, aspects: Sequence[str]) -> dict[Place, Question]:
    questions = {}
    for number, row in enumerate(rows):
        conversation = _conversation(with_prompt(row.values)["prompt"])
        for name in SEGMENTS:
            texts = [segment["text"] for segment in row.values[name]]
            for aspect in aspects:
                if not all(aspect in segment.get("scores", {}) for segment in row.values[name]):
                    questions[Place(number, name, aspect)] = templates.question(conversation, texts, aspect)
    return questions


def _conversation(prompt: str | list[dict[str, Any]]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(json.dumps(message, ensure_ascii=False, default=str) for message in prompt)


def _answers_file(arguments: argparse.Namespace) -> Path:
    path = arguments.answers or arguments.out.with_name(f"{arguments.out.name}.answers")
    return Path(":memory:") if arguments.dry_run and not path.exists() else path


def _describe(rows: int, all_questions: int, pending: Sequence[Question], arguments: argparse.Namespace) -> str:
    usage = Usage(
        sum(len(question.prompt) for question in pending) // LETTERS_PER_TOKEN,
        sum(question.segments for question in pending) * TOKENS_PER_SCORE,
    )
    return (
        f"{len(pending)} requests to {arguments.judge} at {arguments.base_url} for {rows} rows, "
        f"{all_questions - len(pending)} answered before; estimated: {_cost(usage, arguments)}"
    )


def _cost(usage: Usage, arguments: argparse.Namespace) -> str:
    text = f"{usage.prompt} prompt tokens, {usage.answer} answer tokens"
    if arguments.price_per_million_tokens:
        per_prompt, per_answer = arguments.price_per_million_tokens
        text += f", price {(usage.prompt * per_prompt + usage.answer * per_answer) / 1e6:.2f}"
    return text


def _confirm() -> None:
    if not sys.stdin.isatty():
        raise DataError("nobody is there to agree to the cost: --yes agrees, --dry-run only shows it")
    if input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise DataError("not asked for")


async def _ask(pending: Sequence[Question], answers: Answers, arguments: argparse.Namespace) -> dict[Question, str]:
    key = os.environ.get(arguments.api_key_env or "OPENAI_API_KEY", "none")
    async with AsyncOpenAI(base_url=arguments.base_url, api_key=key, max_retries=RETRIES) as client:
        judge = Judge(client, arguments.judge, arguments.temperature)
        failures = await ask_all(judge, pending, answers, arguments.concurrency)
    print(f"used: {_cost(judge.usage, arguments)}")
    return failures


def _fill(rows: Sequence[Row], questions: Mapping[Place, Question], answers: Answers) -> set[int]:
    """Answers go into the rows as scores; returns the numbers of rows that lack one."""
    failed = set()
    for place, question in questions.items():
        scores = answers[question]
        if scores is None:
            failed.add(place.row)
            continue
        for segment, score in zip(rows[place.row].values[place.field], scores, strict=True):
            segment.setdefault("scores", {}).setdefault(place.aspect, score)
    return failed


def _report(rows: Sequence[Row], questions: Mapping[Place, Question], failures: Mapping[Question, str]) -> None:
    for place, question in questions.items():
        if question in failures:
            print(f"{rows[place.row].where}: '{place.field}', {place.aspect}: {failures[question]}", file=sys.stderr)
