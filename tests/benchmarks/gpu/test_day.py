"""The GPU day: stages in time boxes, of which none stops the next, and a rehearsal of all of it on a bare machine."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steersman.benchmarks.gpu import decode_with_vllm
from steersman.benchmarks.gpu.day import Outcome, Stage, plan_stages, run_stages
from steersman.benchmarks.gpu.findings import read_findings
from steersman.benchmarks.gpu.models import METHODS

ROOT = Path(__file__).parents[3]
BARE = ROOT / ".venv" / "bare"
REHEARSED = ("facts", "compile", "check", "step", "tests", "kernels", "sanitizer")


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def _is_running(process: int) -> bool:
    """A process that has ended may wait for its parent to learn of it."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def _run(stages: list[Stage], seconds: float, folder: Path) -> dict[str, Outcome]:
    return {outcome.name: outcome for outcome in run_stages(stages, seconds, folder)}


def test_a_stage_that_hangs_or_fails_costs_its_own_time_and_no_other_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steersman.benchmarks.gpu.day._LEAST_SECONDS", 1)
    child = tmp_path / "child"
    hang = f"""
import subprocess, sys, time
print("begun", flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(child)!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    stages = [
        Stage("hangs", 3, _python(hang)),
        Stage("fails", 60, _python("print('about to fail'); raise SystemExit(7)")),
        Stage("works", 60, _python("import os; print('set to', os.environ['ASKED'])"), {"ASKED": "this"}),
    ]
    began = time.monotonic()
    ended = {name: outcome.ended for name, outcome in _run(stages, 100, tmp_path).items()}
    assert ended == {"hangs": "stopped at its time", "fails": "failed (exit code 7)", "works": "ok"}
    assert time.monotonic() - began < 60
    assert not _is_running(int(child.read_text())), "what a stage began ends with it"
    log = (tmp_path / "log.txt").read_text()
    assert all(line in log for line in ("begun", "about to fail", "set to this"))
    assert [o["ended"] for o in json.loads((tmp_path / "outcomes.json").read_text())] == list(ended.values())


def test_a_stage_for_which_no_time_is_left_is_not_begun(tmp_path: Path) -> None:
    outcomes = _run([Stage("late", 60, _python(f"open({str(tmp_path / 'ran')!r}, 'w')"))], 5, tmp_path)
    assert outcomes["late"] == Outcome("late", "no time left", 0.0)
    assert not (tmp_path / "ran").exists()


def test_on_a_gpu_all_sizes_are_those_that_are_served() -> None:
    stages = plan_stages(Path("out"), gpu=True, vllm=True)
    assert tuple(stage.name for stage in stages) == (*REHEARSED, "vllm")
    for stage in stages:
        assert "--tiny" not in stage.command
        assert "TRITON_INTERPRET" not in stage.environment


def test_latencies_in_vllm_become_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"method": "plain", "sequences": 8, "ratio": 1.0}, {"method": "mixed", "sequences": 8, "ratio": 1.4}]
    asked: list[str] = []

    def decode(argv: list[str]) -> int:
        asked.extend(argv)
        Path(argv[argv.index("--out") + 1]).with_suffix(".json").write_text(json.dumps({"latencies": rows}))
        return 0

    monkeypatch.setattr("steersman.benchmarks.decode.main", decode)
    assert decode_with_vllm.main(["--out", str(tmp_path / "findings.jsonl")]) == 0
    version, *latencies = read_findings(tmp_path / "findings.jsonl")
    assert version["vllm"].startswith("0.")
    assert latencies == [{"stage": "vllm", "what": "latency", **row} for row in rows]
    assert "tiny" not in asked


def test_a_bare_machine_without_a_gpu_rehearses_the_whole_day(tmp_path: Path) -> None:
    """An environment of the packages that a GPU machine has, and the wheels that are sent along: nothing else."""
    assert BARE.exists(), f"{BARE} is missing: make {BARE.relative_to(ROOT)}"
    out = tmp_path / "day"
    environment = {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        "PYTHON": str(BARE / "bin" / "python"), "PACK": str(BARE / "whl"), "OUT": str(out), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    run = subprocess.run(
        ["bash", "scripts/gpu_day.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    result = json.loads((out / "result.json").read_text())
    assert {outcome["name"]: outcome["ended"] for outcome in result["outcomes"]} == dict.fromkeys(REHEARSED, "ok")
    assert result["rehearsal"]
    assert result["environment"]["torch"].startswith("2.11.")
    assert result["environment"]["triton"] == "3.6.0"
    answers = {answer["question"]: answer for answer in result["answers"]}
    assert answers["launches that compile"]["met"]
    assert answers["kernels right, with equal bits"]["met"]
    assert answers["tests"]["answer"].endswith(" 0 failed, 0 skipped")
    found = {(finding["stage"], finding["what"]) for finding in result["findings"]}
    assert {("step", "step"), ("kernels", "timed"), ("sanitizer", "tool")} <= found
    methods = {finding["method"] for finding in result["findings"] if finding["what"] == "step"}
    assert methods == set(METHODS)
    assert (out / "picture.png").stat().st_size > 20_000
    assert "Rehearsal on a CPU" in (out / "result.md").read_text()
    assert len(list(out.iterdir())) <= 8, "no more files come back from the machine"
