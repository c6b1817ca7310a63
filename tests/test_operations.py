"""docs/operations.md names commands, metrics and alerts that exist, and all of them."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from steersman.server.serve import parse_arguments

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "operations.md").read_text()


def test_every_command_has_flags_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    # What vLLM sets for itself while it parses ends with the test.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    text = PAGE.replace("\\\n", " ")
    commands = re.findall(r"^(?:[A-Z_]+=\S+ )*steersman serve (.*)$", text, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        parse_arguments(shlex.split(command))


def test_every_metric_is_explained_and_no_other() -> None:
    code = [path.read_text() for path in (ROOT / "server" / "metrics").glob("*.py")]
    counted = {name for text in code for name in re.findall(r'"(steersman_[a-z_]+)"', text)}
    assert len(counted) > 10
    assert set(re.findall(r"steersman_[a-z_]+", PAGE)) == counted


def test_every_alert_has_a_way_out_and_no_other() -> None:
    (group,) = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yaml").read_text())["groups"]
    rows = re.findall(r"^\| `(Steersman\w+)` \|(?:[^|]+\|){3}$", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted(rule["alert"] for rule in group["rules"])
    assert set(re.findall(r"`(Steersman[A-Z]\w+)`", PAGE)) == set(rows)


def test_every_flag_exists(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    known = set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out))
    assert set(re.findall(r"`(--[a-z][a-z0-9-]+)", PAGE)) <= known
