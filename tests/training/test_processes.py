"""Two processes, started by `accelerate launch`, train as one does with the same number of rows a step."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from steersman.training import command
from steersman.training.checkpoints import read_facts
from steersman.training.world.build import CONFIGS
from tests.support.training import write_config, write_task

# Every prefix of a pair: how many there are differs from row to row, and from process to process.
KINDS: dict[str, dict[str, Any]] = {
    "reward": {"objective": "partial", "prefixes": "causal", "prefixes_per_pair": 0},
    "dpo": {"train_sampling_strategy": "group_by_length"},
}
SCRIPT = """
import sys
from steersman.training import command
sys.exit(max(command.main([kind, "--config", config]) for kind, config in zip(sys.argv[1::2], sys.argv[2::2])))
"""
LAUNCH = (
    *(sys.executable, "-m", "accelerate.commands.launch"),
    *("--config_file", str(CONFIGS / "accelerate" / "processes.yaml"), "--main_process_port", "0"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task, trained on by one process (`reward-1`, `dpo-1`) and by two (`reward-2`, `dpo-2`), which then go on from
    a checkpoint within an epoch (`reward-resumed`)."""
    folder = write_task(tmp_path_factory.mktemp("processes"), initializer_range=0.1)

    def write(kind: str, name: str, processes: int, **keys: Any) -> list[str]:
        steps = {"per_device_train_batch_size": 16 // processes, "save_strategy": "steps", "save_steps": 6}
        config = write_config(folder, output_dir=str(folder / name), **KINDS[kind], **steps, **keys)
        return [kind, str(config.rename(folder / f"{name}.yaml"))]

    for kind in KINDS:
        name, config = write(kind, f"{kind}-1", processes=1)
        assert command.main([name, "--config", config]) == 0
    launched = [part for kind in KINDS for part in write(kind, f"{kind}-2", processes=2)]
    checkpoint = str(folder / "reward-2" / "checkpoint-6")
    launched += write("reward", "reward-resumed", processes=2, resume_from_checkpoint=checkpoint)
    script = folder / "script.py"
    script.write_text(SCRIPT)
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*LAUNCH, str(script), *launched], check=True, env=one_thread, timeout=600)
    return folder


def losses(out: Path, step: int = 12) -> list[float]:
    state = json.loads((out / f"checkpoint-{step}" / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry["loss"] for entry in state["log_history"]]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_losses_and_weights_of_one(folder: Path, kind: str) -> None:
    """Within what float32 loses where sums are taken in another order: 6e-8 of each, and more after steps of AdamW,
    whose division by the root of the second moment makes much of gradients near zero."""
    one, two = folder / f"{kind}-1", folder / f"{kind}-2"
    assert len(losses(one)) == 12
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    expected, found = (load_file(out / "model.safetensors") for out in (one, two))
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)
    assert read_facts(two) == read_facts(one)
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}


def test_two_processes_resume_to_the_same_weights(folder: Path) -> None:
    whole, resumed = (load_file(folder / name / "model.safetensors") for name in ("reward-2", "reward-resumed"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_accumulated_batches_have_the_losses_of_one(folder: Path) -> None:
    """Of 64 rows, steps of 24, the last of 16: two batches instead of three, each with as many prefixes as it has."""
    found = []
    for name, batch, accumulated in (("at-once", 24, 1), ("accumulated", 8, 3)):
        keys = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated, "save_steps": 6}
        config = write_config(folder, **KINDS["reward"], **keys, save_strategy="steps", num_train_epochs=2)
        assert command.main(["reward", "--config", str(config), "--output_dir", str(folder / name)]) == 0
        found.append(losses(folder / name, step=6))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
