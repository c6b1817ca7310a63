"""The folder that a training writes: what it may hold at the start, its checkpoints, and the model at the end."""

from __future__ import annotations

import json
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steersman.training.checkpoints import PICTURE
from steersman.training.errors import ConfigError

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Of a model that was written earlier: what a model of another kind would leave lying beside its own files.
_MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", PICTURE),
)


def claim(config: Any, overwrite: bool) -> None:
    """Settles where a training begins, before anything is loaded: `config.resume_from_checkpoint` becomes the folder of
    a checkpoint, or None for the start.

    config: TRL's. Its `resume_from_checkpoint` may be true, which is the newest whole checkpoint of `output_dir`, or
    the start if there is none yet, so that one command serves the first run and every later one. Raises ConfigError
    where `output_dir` holds what would be lost.
    """
    folder, asked = Path(config.output_dir), str(config.resume_from_checkpoint or "").lower()
    newest = asked == "true"
    checkpoint = None
    if newest:
        checkpoint = next((each for each in checkpoints(folder) if is_whole(each, config.world_size)), None)
    elif asked not in ("", "false"):
        checkpoint = Path(config.resume_from_checkpoint)
        if not is_whole(checkpoint, config.world_size):
            raise ConfigError(
                f"resume_from_checkpoint: {checkpoint} is no whole checkpoint; true takes the newest of output_dir"
            )
    if checkpoint and getattr(config, "sync_ref_model", False):
        raise ConfigError(
            "sync_ref_model moves the reference, which no checkpoint holds: such a training can't be resumed"
        )
    continues = checkpoint is not None and checkpoint.resolve().parent == folder.resolve()
    if not overwrite and not continues:
        _refuse_loss(folder, newest)
    if config.process_index == 0 and (newest or checkpoint):
        print(f"resuming from {checkpoint or 'the start: there is no whole checkpoint yet'}", file=sys.stderr)
    config.resume_from_checkpoint = str(checkpoint) if checkpoint else None


def _refuse_loss(folder: Path, newest: bool) -> None:
    if not newest and checkpoints(folder):
        raise ConfigError(
            f"output_dir {folder} holds checkpoints: continue with resume_from_checkpoint: true, or begin anew with "
            "overwrite_output_dir: true"
        )
    if any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"output_dir {folder} holds a model: name another folder, or replace it with overwrite_output_dir: true"
        )


def checkpoints(folder: Path) -> list[Path]:
    """Those that a Trainer wrote into a folder, whole or not, the newest first."""
    return sorted((each for each in folder.glob("checkpoint-*") if _step(each) >= 0), key=_step, reverse=True)


def is_whole(checkpoint: Path, processes: int) -> bool:
    """Whether a checkpoint was written to its end, for training with this number of processes.

    Each process writes its random state last, and the first one the trainer's state after it. Raises ConfigError for a
    checkpoint of more or other processes, of which training can't be continued exactly.
    """
    expected = {f"rng_state_{rank}.pth" for rank in range(processes)} if processes > 1 else {"rng_state.pth"}
    found = {path.name for path in checkpoint.glob("rng_state*.pth")}
    if not found <= expected:
        raise ConfigError(
            f"{checkpoint} was written by another number of processes than {processes}: continue with as many"
        )
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # A zip file's directory is at its end.
    return found == expected and all(zipfile.is_zipfile(checkpoint / name) for name in found)


def remove_later(folder: Path, step: int) -> None:
    """Removes checkpoints beyond a step: of a run that was given up, or half written. A run that begins at this step
    must never be continued from them."""
    for checkpoint in checkpoints(folder):
        if _step(checkpoint) > step:
            shutil.rmtree(checkpoint)


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """An empty folder to write a model into. What was written takes the place of the model that `folder` holds, weights
    last, when all of it is there: a file of weights is never half of one."""
    folder, unfinished = Path(folder), Path(folder) / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    for old in (path for pattern in _MODEL_FILES for path in folder.glob(pattern)):
        old.unlink()
    for path in sorted(unfinished.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        path.replace(folder / path.name)
    unfinished.rmdir()


def _step(checkpoint: Path) -> int:
    matched = _CHECKPOINT.fullmatch(checkpoint.name)
    return int(matched[1]) if matched else -1
