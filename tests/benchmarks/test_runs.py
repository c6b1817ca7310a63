"""Models that benchmarks train, on a model of a few thousand weights."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from steersman.benchmarks.plain_trl import PlainRun
from steersman.benchmarks.runs import Run
from steersman.guidance.policies import load_policy
from steersman.guidance.reward_loading import load_reward_model
from tests.support.training import write_config, write_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("runs"))


def test_a_run_is_the_users_own_command_and_done_once_its_model_is_there(folder: Path, tmp_path: Path) -> None:
    run = Run("reward", str(write_config(folder)), tmp_path / "model", {"objective": "full"})
    assert not run.done
    run()
    assert run.done
    assert "train_loss" in run.log.read_text(encoding="utf-8")


def test_a_run_that_fails_names_its_log(folder: Path, tmp_path: Path) -> None:
    run = Run("reward", str(write_config(folder)), tmp_path / "model", {"keep": 0})
    with pytest.raises(RuntimeError, match=r"model\.log"):
        run()
    assert "keep is a share" in run.log.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_what_trls_own_trainers_make_is_served(folder: Path, tmp_path: Path, kind: str) -> None:
    run = PlainRun(kind, str(write_config(folder)), tmp_path / kind)
    run()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    if kind == "reward":
        assert load_reward_model(kind, str(run.folder), tokenizer).kind == "causal"
    else:
        assert load_policy(kind, str(run.folder), str(folder / "model"), tokenizer).name == kind
