"""`steersman data annotate`, against a judge behind real HTTP."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steersman import cli
from steersman.training.data.judge import QUOTED
from steersman.training.data.segment import with_segments
from steersman.training.data.segments import ASPECTS
from steersman.training.data.sources import Row
from tests.support.judge import JudgeServer, completion, entries, score_by_rule
from tests.support.preferences import write_rows


def draw_rows(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Rows with segments, each text used once."""
    numbers = iter(rng.sample(range(10**6), k=count * 20))

    def text() -> str:
        return " ".join(f"Sentence {next(numbers)}." for _ in range(rng.randint(1, 4)))

    rows = [{"prompt": f"Question {next(numbers)}?", "chosen": text(), "rejected": text()} for _ in range(count)]
    return [with_segments(Row("", row)) for row in rows]


def scored(rows: list[dict[str, Any]], aspects: tuple[str, ...] = ASPECTS) -> list[dict[str, Any]]:
    """What annotating them must give."""

    def score(segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {"text": s["text"], "scores": {aspect: score_by_rule(aspect, s["text"]) for aspect in aspects}}
            for s in segments
        ]

    fields = ("chosen_segments", "rejected_segments")
    return [row | {name: score(row[name]) for name in fields} for row in rows]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def command(server: JudgeServer, source: Path, out: Path, *flags: str) -> list[str]:
    return ["data", "annotate", str(source), str(out), "--base-url", server.url, "--judge", "judge", "--yes", *flags]


def test_every_segment_is_scored_by_every_aspect_whatever_the_endpoint_does(tmp_path: Path, rng: random.Random) -> None:
    rows = draw_rows(rng, 6)
    nonsense = ["", "no JSON", completion("Good!"), completion(entries([5])), completion(entries([1] * 9)), "[]"]
    faults = [(429, "{}"), (500, "oh"), *((200, body) for body in nonsense)]
    # A question in three meets with a fault when it comes first.
    seen: set[str] = set()

    def fault(number: int, prompt: str) -> tuple[int, str] | None:
        fresh = prompt not in seen
        seen.add(prompt)
        return faults[number // 3 % len(faults)] if fresh and number % 3 == 0 else None

    source = write_rows(tmp_path / "in.jsonl", *rows)
    with JudgeServer(fault) as server:
        assert cli.main(command(server, source, tmp_path / "out.jsonl", "--concurrency", "3")) == 0
    assert read(tmp_path / "out.jsonl") == scored(rows)
    assert cli.main(["data", "check", str(tmp_path / "out.jsonl")]) == 0
    assert len(set(server.prompts)) == 6 * 2 * len(ASPECTS)
    assert len(server.prompts) > len(seen)
    first = server.bodies[0]
    assert (first["path"], first["model"], first["temperature"]) == ("/v1/chat/completions", "judge", 0)
    assert first["response_format"]["json_schema"]["strict"] is True


def test_an_answer_that_cannot_be_read_is_sent_back_with_what_is_wrong(tmp_path: Path, rng: random.Random) -> None:
    rows = draw_rows(rng, 1)
    source = write_rows(tmp_path / "in.jsonl", *rows)
    with JudgeServer(lambda number, prompt: (200, completion("Fine! " * 999)) if number == 1 else None) as server:
        assert cli.main(command(server, source, tmp_path / "out.jsonl", "--concurrency", "1")) == 0
    _, said, complaint = server.bodies[1]["messages"]
    assert said == {"role": "assistant", "content": ("Fine! " * 999)[:QUOTED]}
    assert "can't be read" in complaint["content"]


def test_rows_that_fail_are_listed_and_asked_for_alone_the_next_time(
    tmp_path: Path, rng: random.Random, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = draw_rows(rng, 4)
    source, out = write_rows(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    bad = rows[2]["rejected_segments"][0]["text"].strip()

    def fault(number: int, prompt: str) -> tuple[int, str] | None:
        return (200, completion("I'd rather not.")) if bad in prompt and "**safety**" in prompt else None

    with JudgeServer(fault) as server:
        assert cli.main(command(server, source, out)) == 1
    printed = capsys.readouterr().err
    assert f"{source}:3: 'rejected_segments', safety: no readable answer in 3 attempts" in printed
    assert "1 of 4 rows failed" in printed
    assert read(out) == scored([rows[0], rows[1], rows[3]])

    with JudgeServer() as server:
        assert cli.main(command(server, source, out)) == 0
    assert len(server.prompts) == 1
    assert read(out) == scored(rows)


def test_rows_in_out_are_not_asked_for_again_nor_lost(
    tmp_path: Path, rng: random.Random, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = draw_rows(rng, 3)
    source, out = write_rows(tmp_path / "in.jsonl", *rows[:2]), tmp_path / "out.jsonl"
    with JudgeServer() as server:
        assert cli.main(command(server, source, out, "--aspects", "clarity,safety")) == 0
        (tmp_path / "out.jsonl.answers").unlink()
        server.prompts.clear()
        write_rows(source, *rows)
        assert cli.main(command(server, source, out, "--aspects", "clarity,safety")) == 0
        assert len(server.prompts) == 2 * 2
        assert read(out) == scored(rows, ("clarity", "safety"))
        # Another aspect is asked for: the others stay, also where it fails.
        server.fault = lambda number, prompt: (400, "{}") if rows[1]["prompt"] in prompt else None
        assert cli.main(command(server, source, out, "--aspects", "helpfulness")) == 1
        assert read(out) == [
            *scored(rows[:1], ("clarity", "safety", "helpfulness")),
            *scored(rows[1:2], ("clarity", "safety")),
            *scored(rows[2:], ("clarity", "safety", "helpfulness")),
        ]
        server.fault = lambda number, prompt: None
        server.prompts.clear()
        assert cli.main(command(server, source, out, "--aspects", "helpfulness")) == 0
        assert len(server.prompts) == 2
        assert read(out) == scored(rows, ("clarity", "safety", "helpfulness"))
        # A source that lacks rows of OUT is another task's.
        written = out.read_bytes()
        assert cli.main(command(server, write_rows(source, rows[0]), out, "--aspects", "clarity")) == 2
        assert "2 of its rows are not in IN: --overwrite drops them" in capsys.readouterr().err
        assert out.read_bytes() == written
        assert cli.main(command(server, source, out, "--aspects", "clarity", "--overwrite")) == 0
        assert len(read(out)) == 1


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path: Path, rng: random.Random) -> None:
    rows = draw_rows(rng, 8)
    source, out = write_rows(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    running: list[subprocess.Popen[bytes]] = []

    def kill(number: int, prompt: str) -> tuple[int, str] | None:
        if number == 30:
            os.kill(running[0].pid, signal.SIGKILL)
        return None

    with JudgeServer(kill) as server:
        flags = command(server, source, out, "--concurrency", "2")
        running.append(subprocess.Popen([sys.executable, "-m", "steersman.cli", *flags]))
        assert running[0].wait() == -signal.SIGKILL
        assert not out.exists()
        before = list(server.prompts)
        server.fault = lambda number, prompt: None
        server.prompts.clear()
        assert cli.main(flags) == 0
    assert read(out) == scored(rows)
    # Two were on their way when it was killed, and one more may have been answered but not kept.
    assert len(set(before) & set(server.prompts)) <= 3
    assert len({*before, *server.prompts}) == 8 * 2 * len(ASPECTS)


@pytest.mark.parametrize(("status", "complaint"), [(401, "the judge refuses every request"), (404, "refuses every")])
def test_what_no_request_can_get_past_stops_at_once(
    tmp_path: Path, rng: random.Random, capsys: pytest.CaptureFixture[str], status: int, complaint: str
) -> None:
    source = write_rows(tmp_path / "in.jsonl", *draw_rows(rng, 20))
    with JudgeServer(lambda number, prompt: (status, "{}") if number > 10 else None) as server:
        assert cli.main(command(server, source, tmp_path / "out.jsonl", "--concurrency", "4")) == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]
    assert len(server.prompts) < 20
    assert not (tmp_path / "out.jsonl").exists()


def test_the_cost_is_shown_before_anything_is_asked(
    tmp_path: Path, rng: random.Random, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = draw_rows(rng, 2)
    source, out = write_rows(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    with JudgeServer() as server:
        flags = command(server, source, out, "--price-per-million-tokens", "1000,2000")
        for more in (["--dry-run"], []):
            arguments = [flag for flag in flags if flag != "--yes"] + more
            # Nobody is there to agree.
            assert cli.main(arguments) == (0 if more else 2)
            estimate = capsys.readouterr().out
            assert "20 requests to judge" in estimate
            assert not server.prompts
            assert sorted(path.name for path in tmp_path.iterdir() if "answers" not in path.name) == ["in.jsonl"]
        assert cli.main(flags) == 0
    printed = capsys.readouterr().out
    letters = sum(len(prompt) for prompt in server.prompts)
    segments = sum(len(row[name]) for row in rows for name in ("chosen_segments", "rejected_segments"))
    expected = letters // 4, segments * len(ASPECTS) * 12
    price = (expected[0] * 1000 + expected[1] * 2000) / 1e6
    for text in (estimate, printed):
        assert f"estimated: {expected[0]} prompt tokens, {expected[1]} answer tokens, price {price:.2f}" in text
    assert "used: 2000 prompt tokens, 200 answer tokens, price 2.40" in printed


def test_prompts_are_files_that_can_be_replaced(
    tmp_path: Path, rng: random.Random, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = draw_rows(rng, 1)
    rows[0]["prompt"] = "What does it cost? $5, or ${aspect}?"
    source, out, prompts = write_rows(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl", tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "brevity.md").write_text("Is it short? $3 says it is.")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    flags = ["--aspects", "brevity,safety", "--prompts", str(prompts), "--api-key-env", "JUDGE_KEY"]
    with JudgeServer() as server:
        assert cli.main(command(server, source, out, *flags, "--temperature", "default")) == 0
    assert read(out) == scored(rows, ("brevity", "safety"))
    brevity = next(prompt for prompt in server.prompts if "**brevity**" in prompt)
    assert "Is it short? $3 says it is." in brevity
    assert "What does it cost? $5, or ${aspect}?" in brevity
    assert {body["key"] for body in server.bodies} == {"Bearer secret"}
    assert not any("temperature" in body for body in server.bodies)

    capsys.readouterr()
    assert cli.main(command(server, source, out, "--aspects", "depth")) == 2
    assert "there is no prompt for 'depth': write depth.md" in capsys.readouterr().err
    (prompts / "frame.md").write_text("$conversaton")
    assert cli.main(command(server, source, out, *flags)) == 2
    assert "frame.md: 'conversaton' is no placeholder" in capsys.readouterr().err
