"""What every `steersman train` does with flags before it loads anything."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from trl.trainer.reward_config import RewardConfig

from steersman.training import command
from steersman.training.configuration import parse
from steersman.training.rewards.arguments import RewardArguments

GIVEN = ("--model", "m", "--train_file", "f", "--use_cpu", "true", "--bf16", "false")


def config_of(folder: Path, *flags: str) -> RewardConfig:
    return parse("reward", RewardArguments, RewardConfig, [*GIVEN, "--output_dir", str(folder), *flags])[1]


def test_progress_is_a_bar_in_a_terminal_and_lines_in_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("disable_tqdm: true")
    ours, terminal = os.openpty()
    for descriptor, bar in ((terminal, True), (os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), False)):
        with os.fdopen(descriptor, "w") as stream:
            monkeypatch.setattr(sys, "stderr", stream)
            assert config_of(tmp_path).disable_tqdm is not bar
            assert config_of(tmp_path, "--disable_tqdm", "false").disable_tqdm is False
            assert config_of(tmp_path, "--config", str(tmp_path / "config.yaml")).disable_tqdm is True
    os.close(ours)


def test_reports_go_where_trl_sends_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert config_of(tmp_path).report_to == []
    assert config_of(tmp_path, "--report_to", "tensorboard").report_to == ["tensorboard"]
    unusable = "crystal_ball" if find_spec("tensorboard") else "tensorboard"
    assert command.main(["reward", *GIVEN, "--output_dir", str(tmp_path), "--report_to", unusable]) == 2
    assert f"report_to: {unusable} can't be used" in capsys.readouterr().err
