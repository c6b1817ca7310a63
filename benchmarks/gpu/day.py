"""`python -m steersman.benchmarks.gpu.day`: everything that only a GPU can tell, in one run of nine minutes.

Stages run one after the other, the most valuable first, each a process of its own in a time box. What a stage finds is
on disk at once, so that neither a stage that fails nor the end of the time costs more than what was not reached yet.
`scripts/gpu_day.sh` sets up a bare machine and starts this. Where there is no GPU all stages run at tiny sizes, the
kernels in Triton's interpreter: a rehearsal, whose figures mean nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from steersman.benchmarks.gpu.report import write_report
from steersman.processes import running

_LEAST_SECONDS = 8
"""A stage with less is not begun: importing torch takes as long."""
_STAGE_STOP_S = 2
_MODULE = "steersman.benchmarks.gpu"


@dataclass(frozen=True)
class Stage:
    """A command and the seconds that it may take."""

    name: str
    seconds: int
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended, and after how many seconds."""

    name: str
    ended: str
    """"ok", "failed (exit code n)", "stopped at its time" or "no time left"."""
    seconds: float


def main(argv: Sequence[str]) -> int:
    """Runs the stages and writes log.txt, findings.jsonl, result.json, result.md and picture.png into a folder; 1 where
    a stage failed."""
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}.day", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("out/gpu-day"), help="Folder; its earlier results are removed."
    )
    parser.add_argument("--seconds", type=float, default=540, help="For all stages together.")
    parser.add_argument("stages", nargs="*", help="Only these, by name.")
    args = parser.parse_args(list(argv))
    stages = plan_stages(args.out, torch.cuda.is_available(), find_spec("vllm") is not None)
    if unknown := set(args.stages) - {stage.name for stage in stages}:
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(stage.name for stage in stages)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for old in ("log.txt", "findings.jsonl", "outcomes.json"):
        (args.out / old).unlink(missing_ok=True)
    wanted = [stage for stage in stages if not args.stages or stage.name in args.stages]
    outcomes = run_stages(wanted, args.seconds, args.out)
    write_report(args.out)
    return int(any(outcome.ended.startswith("failed") for outcome in outcomes))


def plan_stages(out: Path, gpu: bool, vllm: bool) -> list[Stage]:
    """All stages in order of their value; without a GPU at tiny sizes, and one in vLLM itself where it is installed."""
    findings = ["--out", str(out / "findings.jsonl"), *([] if gpu else ["--tiny"])]
    interpreted = {} if gpu else {"TRITON_INTERPRET": "1"}

    def module(name: str, *flags: str) -> list[str]:
        return [sys.executable, "-m", f"{_MODULE}.{name}", *findings, *flags]

    return [
        Stage("facts", 40, module("facts")),
        Stage("compile", 60, module("compile_kernels")),
        Stage("check", 60, module("check_kernels"), interpreted),
        Stage("step", 170, module("guided_step")),
        Stage("tests", 150, _test_command(out, gpu)),
        Stage("kernels", 90, module("time_kernels"), interpreted),
        Stage("sanitizer", 110, module("sanitize"), interpreted),
        *([Stage("vllm", 300, module("decode_with_vllm"), _vllm_environment())] if vllm else []),
    ]


def _vllm_environment() -> dict[str, str]:
    """vLLM takes it that FlashInfer is there."""
    chosen = {} if find_spec("flashinfer") else {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    return {"VLLM_NO_USAGE_STATS": "1", **chosen}


def _test_command(out: Path, gpu: bool) -> list[str]:
    """The tests that run on a GPU where there is one; in a rehearsal one file of each kind."""
    tests = ["tests/gpu", "tests/kernels", "tests/guidance/test_gpu_step.py", "tests/guidance/test_kernels.py"]
    if not gpu:
        tests = [
            "tests/kernels/test_rerank.py",
            "tests/guidance/test_gpu_step.py::test_a_read_in_a_step_would_be_noticed",
        ]
    workers = ["-n", "6"] if gpu else []
    # What compiles without a GPU is compiled without one.
    tests += ["--ignore", "tests/kernels/test_resources.py", "--ignore", "tests/kernels/test_cpu.py"]
    quiet = ["-q", "-p", "no:cacheprovider", "--durations=0", f"--junitxml={out / 'tests.xml'}"]
    return [sys.executable, "-m", "pytest", *quiet, *workers, *tests]


def run_stages(stages: Sequence[Stage], seconds: float, out: Path) -> list[Outcome]:
    """Runs them in order until the time is over; outcomes.json is written after each."""
    began, outcomes = time.monotonic(), []
    for stage in stages:
        left = seconds - (time.monotonic() - began)
        outcomes.append(run_stage(stage, left, out / "log.txt"))
        print(f"=== {stage.name}: {outcomes[-1].ended}, {outcomes[-1].seconds:.0f} s", flush=True)
        (out / "outcomes.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return outcomes


def run_stage(stage: Stage, left: float, log: Path) -> Outcome:
    """Runs a stage for at most its own time or the `left` seconds, and ends all of its processes."""
    seconds = min(stage.seconds, left)
    if seconds < _LEAST_SECONDS:
        return Outcome(stage.name, "no time left", 0.0)
    print(f"=== {stage.name}, at most {seconds:.0f} s", flush=True)
    began = time.monotonic()
    with log.open("a") as file:
        file.write(f"=== {stage.name}: {' '.join(stage.command)}\n")
        options: dict[str, Any] = {
            "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "text": True,
            "errors": "replace", "env": {**os.environ, **stage.environment},
        }  # fmt: skip

        def copy(lines: Iterable[str]) -> None:
            for line in lines:
                print(line, end="", flush=True)
                file.write(line)
                file.flush()

        with running(stage.command, _STAGE_STOP_S, **options) as process:
            copying = Thread(target=copy, args=(process.stdout,), daemon=True)
            copying.start()
            try:
                code = process.wait(seconds)
                ended = "ok" if code == 0 else f"failed (exit code {code})"
            except subprocess.TimeoutExpired:
                ended = "stopped at its time"
        copying.join()
    return Outcome(stage.name, ended, round(time.monotonic() - began, 1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
