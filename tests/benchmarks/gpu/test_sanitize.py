"""compute-sanitizer's stage, with a stand-in for the tool that writes what it was asked."""

import os
from pathlib import Path

import pytest

from steersman.benchmarks.gpu import sanitize
from steersman.benchmarks.gpu.findings import read_findings
from steersman.processes import running

_TOOL = """#!/bin/sh
echo "$@" >> {asked}
case "$*" in
  *racecheck*) echo "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"; exit 9 ;;
  *) echo "========= ERROR SUMMARY: 0 errors"; exit 0 ;;
esac
"""


def test_both_tools_watch_our_kernels_and_what_they_report_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, asked = tmp_path / "compute-sanitizer", tmp_path / "asked"
    tool.write_text(_TOOL.format(asked=asked))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sanitize.torch.cuda, "is_available", lambda: True)
    assert sanitize.main(["--out", str(tmp_path / "findings.jsonl")]) == 1
    memcheck, racecheck = read_findings(tmp_path / "findings.jsonl")
    assert (memcheck["name"], memcheck["exit_code"], memcheck["summary"]) == ("memcheck", 0, "ERROR SUMMARY: 0 errors")
    assert racecheck["exit_code"] == 9
    assert "2 hazards" in racecheck["summary"]
    for line in asked.read_text().splitlines():
        assert "--kernel-name regex=^_(" in line
        assert "check_kernels --once" in line
        assert "--tiny" not in line


def test_on_a_gpu_without_the_tool_nothing_was_watched_and_that_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanitize.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize.shutil, "which", lambda _: None)
    monkeypatch.setattr(sanitize, "running", lambda _, stop_limit_s: running(["true"], stop_limit_s))
    assert sanitize.main(["--out", str(tmp_path / "findings.jsonl")]) == 1
    [found] = read_findings(tmp_path / "findings.jsonl")
    assert not found["watched"]
