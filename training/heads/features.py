"""Hidden states of the frozen base at the places where a training needs them: computed once, kept in a mapped file.

They are kept as the base computes them where it computes in bfloat16, and in float16 else: its rounding, 2⁻¹¹ of a
value, is an eighth of what serving the base in bfloat16 moves them by, and half of what float32 would take of a disk.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from steersman.training.configuration import ConfigError, log
from steersman.training.heads.frozen_base import FrozenBase

_SECONDS = 20.0  # between two lines about progress
_VERSION = 1  # of the file's layout


@dataclass(frozen=True)
class Reading:
    """A text, and the tokens of it before which the hidden state is needed."""

    ids: list[int]
    places: list[int]
    """Of these tokens, from 1, ascending."""


@dataclass(frozen=True)
class Features:
    """Hidden states of some readings, one after the other."""

    states: Tensor
    """[N, D], mapped from a file."""
    starts: list[int]
    """Of each reading: the row of its first place."""

    def rows(self, reading: int, places: Tensor) -> Tensor:
        """Rows of `states`, int64, for indices into the places of a reading."""
        return places + self.starts[reading]

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [D] float32 of every dimension; a deviation of 0 is returned as 1."""
        count, total = len(self.states), torch.zeros(2, self.states.shape[1], dtype=torch.float64)
        shift = self.states[0].double()
        for part in self.states.split(2**14):
            own = part.double() - shift
            total += torch.stack((own.sum(dim=0), own.square().sum(dim=0)))
        mean, square = total / count
        deviation = (square - mean.square()).clamp(min=0).sqrt().float()
        return (mean + shift).float(), torch.where(deviation > 0, deviation, 1.0)


@contextmanager
def feature_folder(cache: str | None, output_dir: str | Path) -> Iterator[Path]:
    """Where features lie: the named cache, which is kept, or a folder inside of output_dir that is removed in the end.
    What an earlier training that was killed left there is removed at the start."""
    if cache is not None:
        Path(cache).mkdir(parents=True, exist_ok=True)
        yield Path(cache)
        return
    folder = Path(output_dir) / "features"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def compute_features(
    base: FrozenBase, readings: Sequence[Reading], folder: Path, *, tokens: int, what: str
) -> Features:
    """Hidden states of all readings; those that the folder holds of the same base and readings are used again.

    tokens: in one forward, about. what: of which rows, for the log. Raises ConfigError where they don't fit the disk,
    or are beyond float16.
    """
    counts = [len(reading.places) for reading in readings]
    starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
    dtype = torch.bfloat16 if base.model.dtype == torch.bfloat16 else torch.float16
    shape = (starts[-1], base.facts.hidden_size)
    path = folder / f"features-{_name(base, readings, dtype)}.bin"
    size = shape[0] * shape[1] * dtype.itemsize
    shown = f"features of {what}: {shape[0]} hidden states of {shape[1]} numbers, {size / 2**20:.0f} MiB"
    if path.is_file() and path.stat().st_size == size:
        log(f"{shown}, are there already, in {path}")
        return Features(_map(path, shape, dtype), starts)
    log(f"{shown}, are computed into {folder}")
    unfinished = path.with_suffix(f".unfinished-{os.getpid()}")
    try:
        _reserve(unfinished, size)
        states = _map(unfinished, shape, dtype)
        _fill(base, readings, states, starts, tokens)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return Features(states, starts)


def _fill(base: FrozenBase, readings: Sequence[Reading], states: Tensor, starts: Sequence[int], tokens: int) -> None:
    began = last = time.monotonic()
    done = 0
    texts = [reading.ids[: reading.places[-1]] for reading in readings]
    for indices, hidden in base.iterate(texts, tokens):
        for n, own in zip(indices, hidden, strict=True):
            before = torch.tensor(readings[n].places, device=own.device) - 1
            states[starts[n] : starts[n + 1]] = own[before].to(states.dtype).cpu()
        done += len(indices)
        written = torch.cat([states[starts[n] : starts[n + 1]] for n in indices])
        if not written.isfinite().all():
            raise ConfigError(
                f"model: {base.path} has hidden states that are not finite in {str(states.dtype)[6:]}: save the base "
                "in bfloat16, whose hidden states are kept as they are, and see whether its weights are finite"
            )
        if time.monotonic() - last > _SECONDS:
            last = time.monotonic()
            log(f"features: {done} of {len(texts)} texts, {last - began:.0f} s")


def _name(base: FrozenBase, readings: Sequence[Reading], dtype: torch.dtype) -> str:
    """Of the file that belongs to this base, these token ids and places, and no others."""
    digest = hashlib.sha256(f"{_VERSION} {base.fingerprint()} {dtype}".encode())
    for reading in readings:
        for numbers in (reading.ids, reading.places):
            digest.update(torch.tensor([len(numbers), *numbers], dtype=torch.int32).numpy().tobytes())
    return digest.hexdigest()[:16]


def _reserve(path: Path, size: int) -> None:
    """A file of this size, so that a full disk is found now and not as a signal while the file is written."""
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise ConfigError(
                f"features take {size / 2**20:.0f} MiB in {path.parent}, which can't be had: {error.strerror}; name a "
                "folder on another disk as feature_cache, or train on fewer places (prefixes_per_pair, keep, pairs)"
            ) from None


def _map(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=True, size=shape[0] * shape[1], dtype=dtype).view(shape)
