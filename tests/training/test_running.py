"""Trainings that are killed, that go wrong, and that find something where they are to write."""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl.trainer.dpo_config import DPOConfig

from steersman.training import command
from steersman.training.checkpoints import read_facts
from steersman.training.errors import ConfigError
from steersman.training.output import checkpoints, claim, is_whole
from steersman.training.running import gather
from tests.support.training import write_config, write_task

KINDS: dict[str, dict[str, Any]] = {
    "causal": {"objective": "partial", "prefixes": "causal", "prefixes_per_pair": 3},
    "vocabulary": {"objective": "vocabulary", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
    "dpo": {"train_sampling_strategy": "group_by_length", "disable_dropout": False},
    "tdpo-lora": {"method": "tdpo2", "lora_rank": 4, "store": "bfloat16"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("running"), initializer_range=0.1, attention_dropout=0.1)


@pytest.fixture(scope="module")
def processes() -> Iterator[Any]:
    """Processes that have imported everything when they begin, and compute with as many threads as the tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["steersman.training.dpo", "steersman.training.reward"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield context


def arguments(folder: Path, kind: str, out: Path, **keys: Any) -> list[str]:
    """Of `steersman train`: 20 steps on one of the KINDS."""
    name = "reward" if "objective" in KINDS[kind] else "dpo"
    config = write_config(folder, **{"num_train_epochs": 5, "logging_strategy": "no", **KINDS[kind], **keys})
    own = config.rename(folder / f"{kind}-{out.name}.yaml")
    return [name, "--config", str(own), "--output_dir", str(out)]


def kill_after(checkpoint: Path, process: Any) -> None:
    """Kills the process, wherever it is, when it has written the checkpoint."""
    deadline = time.monotonic() + 120
    while not is_whole(checkpoint, 1):
        assert process.exitcode is None
        assert time.monotonic() < deadline
        wait([process.sentinel], timeout=0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def weights(out: Path) -> dict[str, torch.Tensor]:
    (path,) = out.glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_is_killed_and_resumed_ends_with_the_same_weights(
    folder: Path, tmp_path: Path, processes: Any, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments(folder, kind, tmp_path / "whole", save_strategy="no")) == 0

    out = tmp_path / "killed"
    argv = arguments(folder, kind, out, save_strategy="steps", save_steps=3, resume_from_checkpoint=True)
    process = processes.Process(target=command.main, args=(argv,))
    process.start()
    kill_after(out / "checkpoint-6", process)
    # Whatever the moment was, a checkpoint of which the end is missing lies there too.
    half = shutil.copytree(out / "checkpoint-6", out / "checkpoint-19")
    (half / "trainer_state.json").write_text((half / "trainer_state.json").read_text(encoding="utf-8")[:-9])
    capsys.readouterr()
    assert command.main(argv) == 0
    assert f"resuming from {out / 'checkpoint-'}" in capsys.readouterr().err
    assert not half.exists()

    once, twice = weights(tmp_path / "whole"), weights(out)
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert read_facts(tmp_path / "whole") == read_facts(out)


def poison(folder: Path, out: Path) -> Path:
    """The model to start from with one weight that is not a number."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = torch.nan
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "model" / name, out)
    return out


def test_a_loss_that_is_not_finite_stops_training_and_leaves_the_earlier_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, kind = tmp_path / "model", "causal"
    assert command.main(arguments(folder, kind, out, max_steps=1)) == 0
    earlier = {path.name: path.read_bytes() for path in out.iterdir()}
    away = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 1}
    for keys, complaint in [
        ({"model": str(poison(folder, tmp_path / "poisoned"))}, "not finite, in model.layers.0.mlp.up_proj.weight"),
        ({**away, "learning_rate": 1e30}, "the loss of step 2 is nan, and training stops: try a learning_rate below"),
        ({**away, "learning_rate": 1e39}, "step 1 left a weight that is not finite, in model.embed_tokens.weight"),
        ({**away, "learning_rate": 1e39, "save_strategy": "no", "max_steps": 1}, "step 1 left a weight"),
    ]:
        capsys.readouterr()
        assert command.main(arguments(folder, kind, out, overwrite_output_dir=True, **keys)) == 2
        assert complaint in capsys.readouterr().err.splitlines()[-1]
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == earlier
        for checkpoint in checkpoints(out):
            assert all(weight.isfinite().all() for weight in weights(checkpoint).values())


def test_a_model_or_checkpoints_that_are_there_are_kept_unless_told_otherwise(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, saving = tmp_path / "model", {"save_strategy": "steps", "save_steps": 2}

    def run(**keys: Any) -> str:
        capsys.readouterr()
        code = command.main(arguments(folder, "causal", out, **keys))
        error = capsys.readouterr().err
        assert code == (2 if "error" in error else 0)
        return error

    # One command from the first run on: with no checkpoint yet it begins.
    assert "resuming from the start" in run(max_steps=4, resume_from_checkpoint=True, **saving)
    assert [path.name for path in checkpoints(out)] == ["checkpoint-4", "checkpoint-2"]
    before = sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*"))
    assert "resume_from_checkpoint: true, or begin anew with overwrite_output_dir: true" in run()
    assert "checkpoint-9 is no whole checkpoint" in run(resume_from_checkpoint=str(out / "checkpoint-9"))
    assert sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*")) == before

    # An earlier checkpoint: what came after it is another run's. At the end there is nothing left to train.
    path = str(out / "checkpoint-2")
    assert f"resuming from {path}" in run(max_steps=3, resume_from_checkpoint=path, **saving)
    assert [path.name for path in checkpoints(out)] == ["checkpoint-3", "checkpoint-2"]
    finished = weights(out)
    assert "checkpoint-3" in run(max_steps=3, resume_from_checkpoint=True, **saving)
    assert all(torch.equal(weight, finished[name]) for name, weight in weights(out).items())

    for name in ("adapter_config.json", "adapter_model.safetensors"):  # of a model of another kind
        (out / name).touch()
    assert "error" not in run(max_steps=1, overwrite_output_dir=True, save_strategy="no", figure=False)
    assert {path.name for path in out.iterdir()} == {
        *("model.safetensors", "config.json", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert "accuracy.png" not in (out / "README.md").read_text(encoding="utf-8")
    assert "holds a model: name another folder, or replace it" in run(resume_from_checkpoint=True)


def test_a_reference_that_moves_is_not_resumed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint-4", processes=1)
    config = DPOConfig(str(tmp_path), sync_ref_model=True, resume_from_checkpoint="true", use_cpu=True, bf16=False)
    with pytest.raises(ConfigError, match="no checkpoint holds"):
        claim(config, overwrite=False)


def write_checkpoint(folder: Path, processes: int) -> None:
    """The files by which a checkpoint is known to be whole."""
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    for name in ("rng_state.pth",) if processes == 1 else (f"rng_state_{rank}.pth" for rank in range(processes)):
        torch.save({}, folder / name)


def test_a_checkpoint_of_other_processes_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-4"
    write_checkpoint(folder, processes=2)
    assert is_whole(folder, 2)
    assert not is_whole(folder, 3)
    with pytest.raises(ConfigError, match="another number of processes than 1"):
        is_whole(folder, 1)
    with open(folder / "rng_state_1.pth", "r+b") as file:
        file.truncate(40)
    assert not is_whole(folder, 2)


def test_weights_that_are_gathered_in_files_are_the_model_s(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    gathered = gather(trainer)
    assert gathered is not None
    assert type(gathered) is type(model)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in gathered.state_dict().items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "measured_by"),
    [
        ("vocabulary", "reward.accuracy_by_share"),
        ("dpo", "dpo.implicit_accuracy"),
        ("tdpo-lora", "dpo.implicit_accuracy"),
    ],
)
def test_a_model_is_saved_before_it_is_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, measured_by: str
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert command.main(arguments(folder, kind, whole, num_train_epochs=1)) == 0

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("the evaluation needs more")

    monkeypatch.setattr(f"steersman.training.{measured_by}", fail)
    with pytest.raises(MemoryError):
        command.main(arguments(folder, kind, out, num_train_epochs=1))
    saved, expected = weights(out), weights(whole)
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    assert (out / "README.md").is_file()
    facts = read_facts(whole)
    assert read_facts(out) == {
        name: value for name, value in facts.items() if name not in ("accuracy", "validation_pairs")
    }
