"""What every `steersman train` does with flags before it loads anything."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.reward_config import RewardConfig

from steersman.training import command
from steersman.training.configuration import parse
from steersman.training.policies.arguments import DPOArguments
from steersman.training.rewards.arguments import RewardArguments
from steersman.training.world.build import CONFIGS
from tests.support.training import write_config, write_task

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


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_a_recipe_s_validation_data_does_not_go_with_other_training_data(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = CONFIGS / ("reward-full.yaml" if kind == "reward" else "dpo.yaml")
    argv = ["--config", str(recipe), "--output_dir", str(tmp_path)]
    types: Any = (RewardArguments, RewardConfig) if kind == "reward" else (DPOArguments, DPOConfig)

    def validation_of(*flags: str) -> str | None:
        path: str | None = parse(kind, *types, [*argv, *flags])[0].validation_file
        return path

    assert validation_of() == "validation_pairs.jsonl"
    assert capsys.readouterr().err == ""
    for flags in (["--train_file", "mine.jsonl"], ["--train_file=mine.jsonl"], ["--train-file", "mine.jsonl"]):
        assert validation_of(*flags) is None
        assert "validation_file validation_pairs.jsonl is left out, since --train_file" in capsys.readouterr().err
    assert validation_of("--train_file", "mine.jsonl", "--validation_file", "held.jsonl") == "held.jsonl"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_the_log_names_what_is_trained_and_measured_on(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_task(tmp_path)
    config = str(write_config(folder, max_steps=1, validation_file=str(tmp_path / "demo.jsonl")))
    flags = ["--train_file", str(folder / "pairs.jsonl"), "--overwrite_output_dir", "true"]
    cut = ["--pairs", "50"] if kind == "dpo" else []
    assert command.main([kind, "--config", config, *flags, *cut]) == 0
    rows = 50 if cut else 64
    log = capsys.readouterr().err
    assert f"training on {rows} rows of {folder / 'pairs.jsonl'}; the model is not measured: there is no val" in log
    assert bool(cut) == (f"pairs: 50 leaves out the last 14 rows of {folder / 'pairs.jsonl'}" in log)
    given = [*flags, "--validation_file", str(folder / "pairs.jsonl")]
    assert command.main([kind, "--config", config, *given]) == 0
    assert f"the model is measured on 64 rows of {folder / 'pairs.jsonl'}" in capsys.readouterr().err
