"""`python -m steersman.benchmarks.gpu.report FOLDER`: one table, one JSON file and one picture of a GPU day.

The day itself writes them into its folder. With `--keep` they are also written under benchmarks/results/gpu/, named
after the card, with the checkout's commit where the machine had none.
"""

import argparse
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from steersman.benchmarks.common.rendering import markdown, terminal
from steersman.benchmarks.common.results import RESULTS, environment
from steersman.benchmarks.gpu.findings import read_findings
from steersman.benchmarks.gpu.picture import draw

STEP_GOALS = {"candidate scoring": 1.15, "vocabulary head": 1.05, "head": 1.02}
"""A guided step over a plain one, at most."""
KERNEL_GOAL, KERNEL_ROWS = 1.25, 64
"""A kernel over its floor, at most, from so many rows on."""


@dataclass(frozen=True)
class Answer:
    """One question of the day."""

    question: str
    answer: str
    goal: str = ""
    met: bool | None = None
    """None where nothing was measured, or there is no goal."""


def main(argv: Sequence[str]) -> int:
    """Writes the report of a folder, and keeps it."""
    parser = argparse.ArgumentParser(prog="python -m steersman.benchmarks.gpu.report", description=__doc__)
    parser.add_argument("folder", type=Path, help="What a GPU day has written.")
    parser.add_argument("--keep", action="store_true", help="Write it under benchmarks/results/gpu/ too.")
    args = parser.parse_args(list(argv))
    body = write_report(args.folder)
    if not args.keep:
        return 0
    if body["rehearsal"]:
        print("steersman: a rehearsal without a GPU measures nothing; there is nothing to keep", file=sys.stderr)
        return 2
    name = re.sub(r"[^a-z0-9]+", "-", body["device"]["name"].lower()).strip("-")
    kept = RESULTS / "gpu" / name
    kept.parent.mkdir(exist_ok=True)
    _write(kept.with_suffix(".json"), kept.with_suffix(".md"), kept.with_suffix(".png"), body)
    print(f"written: {kept}.json, .md and .png")
    return 0


def write_report(folder: Path) -> dict[str, Any]:
    """Writes result.json, result.md and picture.png into a day's folder and prints the table; returns the JSON."""
    body = build_body(folder)
    _write(folder / "result.json", folder / "result.md", folder / "picture.png", body)
    Console().print(terminal(_table(body["answers"]), _title(body)))
    return body


def build_body(folder: Path) -> dict[str, Any]:
    """Everything that a day has found, and the answers to its questions."""
    findings = read_findings(folder / "findings.jsonl")
    outcomes = folder / "outcomes.json"
    device: dict[str, Any] = next(
        (f for f in findings if f["what"] == "device"), {"name": "unknown", "rehearsal": True}
    )
    known = next((f for f in findings if f["what"] == "environment"), {})
    # A machine that was sent the files only knows no commit; this checkout does.
    known = {**known, "commit": known.get("commit") or environment()["commit"]}
    tests = _read_tests(folder / "tests.xml")
    return {
        "rehearsal": device["rehearsal"],
        "device": device,
        "environment": known,
        "outcomes": json.loads(outcomes.read_text()) if outcomes.exists() else [],
        "answers": [asdict(answer) for answer in _answers(findings, tests, device["rehearsal"])],
        "tests": tests,
        "findings": findings,
    }


def _answers(findings: Sequence[dict[str, Any]], tests: dict[str, int] | None, rehearsal: bool) -> list[Answer]:
    timed = [*_steps(findings), *_decoding(findings), *_kernels(findings)]
    # Times of a rehearsal meet no goal and miss none.
    steps_and_kernels = [replace(answer, met=None) for answer in timed] if rehearsal else timed
    return [
        _compiled(findings),
        _checked(findings),
        _waits(findings),
        *_raised(findings),
        _tests(tests),
        *steps_and_kernels,
        *_sanitized(findings),
    ]


def _select(findings: Sequence[dict[str, Any]], stage: str, what: str) -> list[dict[str, Any]]:
    return [found for found in findings if found["stage"] == stage and found["what"] == what]


def _compiled(findings: Sequence[dict[str, Any]]) -> Answer:
    found = _select(findings, "compile", "launches")
    if not found:
        return Answer("launches that compile", "not reached", "all")
    compiled, failed = found[0]["compiled"], found[0]["failed"]
    return Answer("launches that compile", f"{compiled} of {compiled + failed}", "all", failed == 0)


def _checked(findings: Sequence[dict[str, Any]]) -> Answer:
    found = _select(findings, "check", "kernel")
    wrong = [f"{case['name']}: {case['verdict']}" for case in found if case["verdict"] != "right"]
    text = f"{len(found) - len(wrong)} of {len(found)}" if found else "not reached"
    return Answer("kernels right, with equal bits", "; ".join([text, *wrong]), "all", not wrong if found else None)


def _steps(findings: Sequence[dict[str, Any]]) -> list[Answer]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for found in _select(findings, "step", "step"):
        rows.setdefault(found["method"], []).append(found)
    answers = []
    for method in dict.fromkeys([*STEP_GOALS, *rows]):
        if method == "plain":
            continue
        own, goal = rows.get(method, []), STEP_GOALS.get(method)
        ratios = ", ".join(f"{row['over_plain']:.2f} at {row['sequences']}" for row in own) or "not reached"
        met = None if goal is None or not own else all(row["over_plain"] <= goal for row in own)
        goal_text = "" if goal is None else f"at most {goal:.2f}"
        answers.append(Answer(f"step over plain, {method}", ratios, goal_text, met))
    return answers


def _decoding(findings: Sequence[dict[str, Any]]) -> list[Answer]:
    """What vLLM itself takes; nothing where it was not installed."""
    versions, latencies = _select(findings, "vllm", "version"), _select(findings, "vllm", "latency")
    answers = []
    for method in dict.fromkeys(row["method"] for row in latencies if row["method"] != "plain"):
        ratios = ", ".join(f"{row['ratio']:.2f} at {row['sequences']}" for row in latencies if row["method"] == method)
        answers.append(Answer(f"token over plain in vLLM {versions[0]['vllm']}, {method}", ratios))
    return answers


def _waits(findings: Sequence[dict[str, Any]]) -> Answer:
    waits, checked = _select(findings, "step", "waits"), _select(findings, "step", "never waits")
    if not waits and not checked:
        return Answer("steps that wait for the device", "not reached", "none")
    where = [f"{found['method']} at {found['sequences']}: {' '.join(found['where'][-2:])}" for found in waits]
    text = f"{len(waits)} of {len(waits) + len(checked)}"
    return Answer("steps that wait for the device", "; ".join([text, *where]), "none", not waits)


def _raised(findings: Sequence[dict[str, Any]]) -> list[Answer]:
    """Models and methods that were left out because they raised; nothing where none did."""
    found = _select(findings, "step", "raised")
    text = "; ".join(f"{f.get('model') or f['method']}: {f['error']}" for f in found)
    return [Answer("models and methods that raised", text, "none", False)] if found else []


def _tests(tests: dict[str, int] | None) -> Answer:
    if tests is None:
        return Answer("tests", "not reached", "all pass")
    failed = tests["failures"] + tests["errors"]
    passed = tests["tests"] - failed - tests["skipped"]
    text = f"{passed} passed, {failed} failed, {tests['skipped']} skipped"
    return Answer("tests", text, "all pass", failed == 0 and passed > 0)


def _kernels(findings: Sequence[dict[str, Any]]) -> list[Answer]:
    timed = [f for f in _select(findings, "kernels", "timed") if f["version"] == "steersman"]
    answers = []
    for kernel in dict.fromkeys(found["kernel"] for found in timed):
        own = [found for found in timed if found["kernel"] == kernel]
        bound = [found["over_floor"] for found in own if found["rows"] >= KERNEL_ROWS]
        text = ", ".join(f"{found['over_floor']:.2f} at {found['shape']}" for found in own)
        met = max(bound) <= KERNEL_GOAL and all(found["right"] for found in own) if bound else None
        goal = f"at most {KERNEL_GOAL} from {KERNEL_ROWS} rows"
        answers.append(Answer(f"time over floor, {kernel}", text, goal, met))
    return answers or [Answer("time over floor", "not reached", f"at most {KERNEL_GOAL} from {KERNEL_ROWS} rows")]


def _sanitized(findings: Sequence[dict[str, Any]]) -> list[Answer]:
    found = _select(findings, "sanitizer", "tool")
    if not found:
        return [Answer("compute-sanitizer", "not reached", "silent")]
    return [
        Answer(f"compute-sanitizer, {tool['name']}", str(tool["summary"]), "silent", tool["exit_code"] == 0)
        if tool["watched"]
        else Answer("compute-sanitizer", "not there: nothing was watched", "silent")
        for tool in found
    ]


def _read_tests(path: Path) -> dict[str, int] | None:
    if not path.exists():
        return None
    suite = ElementTree.parse(path).getroot().find("testsuite")
    if suite is None:
        return None
    return {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}


def _table(answers: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    met = {True: "yes", False: "NO", None: ""}
    return {
        "question": [answer["question"] for answer in answers],
        "answer": [answer["answer"] for answer in answers],
        "goal": [answer["goal"] for answer in answers],
        "met": [met[answer["met"]] for answer in answers],
    }


def _title(body: dict[str, Any]) -> str:
    known = body["environment"]
    versions = ", ".join(f"{name} {known.get(name)}" for name in ("torch", "triton", "transformers"))
    title = f"{body['device']['name']}: {versions}, commit {known.get('commit')}"
    return f"Rehearsal on a CPU at tiny sizes; times mean nothing. {title}" if body["rehearsal"] else title


def _write(data: Path, text: Path, picture: Path, body: dict[str, Any]) -> None:
    data.write_text(json.dumps(body, indent=1) + "\n")
    stages = "\n".join(f"- {o['name']}: {o['ended']}, {o['seconds']} s" for o in body["outcomes"])
    command = "`bash scripts/gpu_day.sh`"
    text.write_text(
        f"# A GPU day\n\n{_title(body)}. Command: {command}.\n\n{markdown(_table(body['answers']))}\n"
        f"Stages:\n\n{stages}\n\n![A GPU day]({picture.name})\n"
    )
    draw(body["findings"], _title(body), picture, STEP_GOALS, KERNEL_GOAL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
