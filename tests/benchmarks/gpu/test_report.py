"""The report of a GPU day: what was found against the goals, and what was not reached."""

import json
from pathlib import Path
from typing import Any

import pytest

from steersman.benchmarks.gpu import report
from steersman.benchmarks.gpu.report import build_body, main, write_report

DEVICE = {"stage": "facts", "what": "device", "name": "NVIDIA H100 80GB HBM3", "rehearsal": False}


def _step(method: str, sequences: int, ratio: float) -> dict[str, Any]:
    rest = {"over_plain": ratio, "ratios": [ratio - 0.01, ratio + 0.01]}
    return {"stage": "step", "what": "step", "method": method, "sequences": sequences, **rest}


def _kernel(rows: int, over: float, version: str = "steersman", right: bool = True) -> dict[str, Any]:
    what = {"stage": "kernels", "what": "timed", "kernel": "topk", "shape": f"({rows})", "rows": rows}
    return {**what, "version": version, "over_floor": over, "right": right}


def _tool(name: str, code: int) -> dict[str, Any]:
    summary = f"ERROR SUMMARY: {code} errors"
    return {
        "stage": "sanitizer", "what": "tool", "name": name, "watched": True, "exit_code": code, "summary": summary,
    }  # fmt: skip


def _write(folder: Path, *findings: dict[str, Any]) -> Path:
    (folder / "findings.jsonl").write_text("".join(json.dumps(finding) + "\n" for finding in findings))
    return folder


def _answers(folder: Path) -> dict[str, tuple[str, bool | None]]:
    return {a["question"]: (a["answer"], a["met"]) for a in build_body(folder)["answers"]}


def test_ratios_are_held_against_their_goals_at_every_number_of_sequences(tmp_path: Path) -> None:
    steps = [_step("plain", 1, 1.0), _step("candidate scoring", 1, 1.12), _step("candidate scoring", 8, 1.16)]
    answers = _answers(_write(tmp_path, DEVICE, *steps, _step("vocabulary head", 1, 1.05), _step("mixed", 1, 1.9)))
    assert answers["step over plain, candidate scoring"] == ("1.12 at 1, 1.16 at 8", False)
    assert answers["step over plain, vocabulary head"] == ("1.05 at 1", True)
    assert answers["step over plain, mixed"] == ("1.90 at 1", None)


def test_what_vllm_itself_takes_is_told_with_its_version(tmp_path: Path) -> None:
    rows = [("plain", 1, 1.0), ("PARGS, k = 10", 1, 1.2), ("PARGS, k = 10", 8, 1.3)]
    latencies = [
        {"stage": "vllm", "what": "latency", "method": method, "sequences": sequences, "ratio": ratio}
        for method, sequences, ratio in rows
    ]
    answers = _answers(_write(tmp_path, DEVICE, {"stage": "vllm", "what": "version", "vllm": "0.26.0"}, *latencies))
    assert answers["token over plain in vLLM 0.26.0, PARGS, k = 10"] == ("1.20 at 1, 1.30 at 8", None)


@pytest.mark.parametrize(("over", "right", "met"), [(1.25, True, True), (1.26, True, False), (1.1, False, False)])
def test_kernels_are_held_against_their_floor_from_64_rows_on(
    tmp_path: Path, over: float, right: bool, met: bool
) -> None:
    rows = [_kernel(64, over, right=right), _kernel(1, 9.0), _kernel(64, 3.0, version="torch")]
    assert _answers(_write(tmp_path, DEVICE, *rows))["time over floor, topk"][1] is met


def test_waits_wrong_kernels_failed_launches_and_reports_of_a_sanitizer_are_named(tmp_path: Path) -> None:
    found = [
        {"stage": "compile", "what": "launches", "compiled": 63, "failed": 1},
        {"stage": "check", "what": "kernel", "name": "blend", "verdict": "wrong"},
        {"stage": "check", "what": "kernel", "name": "topk", "verdict": "right"},
        {"stage": "step", "what": "never waits", "method": "mixed", "sequences": 1},
        {"stage": "step", "what": "waits", "method": "mixed", "sequences": 8, "where": ["a.py:1", "b.py:2", "c.py:3"]},
        _tool("memcheck", 0),
        _tool("racecheck", 9),
    ]
    (tmp_path / "tests.xml").write_text('<x><testsuite tests="9" failures="1" errors="1" skipped="2"/></x>')
    answers = _answers(_write(tmp_path, DEVICE, *found))
    assert answers["launches that compile"] == ("63 of 64", False)
    assert answers["kernels right, with equal bits"] == ("1 of 2; blend: wrong", False)
    assert answers["steps that wait for the device"] == ("1 of 2; mixed at 8: b.py:2 c.py:3", False)
    assert answers["tests"] == ("5 passed, 2 failed, 2 skipped", False)
    assert answers["compute-sanitizer, memcheck"][1]
    assert answers["compute-sanitizer, racecheck"] == ("ERROR SUMMARY: 9 errors", False)


def test_what_raised_is_named_and_the_rest_is_reported(tmp_path: Path) -> None:
    raised = [
        {"stage": "step", "what": "raised", "model": "vocabulary", "error": "ModelRefused: it differs"},
        {"stage": "step", "what": "raised", "method": "mixed", "sequences": 8, "error": "RuntimeError: no"},
    ]
    answers = _answers(_write(tmp_path, DEVICE, *raised, _step("candidate scoring", 1, 1.1)))
    text = "vocabulary: ModelRefused: it differs; mixed: RuntimeError: no"
    assert answers["models and methods that raised"] == (text, False)
    assert answers["step over plain, candidate scoring"][1]


def test_what_was_not_reached_is_neither_met_nor_missed(tmp_path: Path) -> None:
    answers = _answers(_write(tmp_path))
    assert {met for _, met in answers.values()} == {None}
    assert {answer for answer, _ in answers.values()} == {"not reached"}
    write_report(tmp_path)
    assert (tmp_path / "picture.png").stat().st_size > 5_000


def test_times_of_a_rehearsal_meet_no_goal_and_miss_none(tmp_path: Path) -> None:
    rehearsal = {**DEVICE, "name": "CPU", "rehearsal": True}
    answers = _answers(_write(tmp_path, rehearsal, _step("candidate scoring", 1, 9.0), _kernel(64, 1.0)))
    assert answers["step over plain, candidate scoring"][1] is None
    assert answers["time over floor, topk"][1] is None


def test_a_day_is_kept_under_the_card_s_name_and_a_rehearsal_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    day = tmp_path / "day"
    day.mkdir()
    assert main([str(_write(day, DEVICE, _step("mixed", 1, 1.2))), "--keep"]) == 0
    kept = json.loads((tmp_path / "gpu" / "nvidia-h100-80gb-hbm3.json").read_text())
    assert kept["environment"]["commit"], "the checkout's, where the machine knew none"
    assert {path.suffix for path in (tmp_path / "gpu").iterdir()} == {".json", ".md", ".png"}
    assert main([str(_write(day, {**DEVICE, "rehearsal": True})), "--keep"]) == 2
    assert "nothing to keep" in capsys.readouterr().err
