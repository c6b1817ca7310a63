"""Models that a benchmark needs: preference pairs of a seed, and runs of `steersman train` on them, each done once.

A seed draws other pairs with other label noise, and trains on them in another order.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from steersman.demo import MODELS, WORLD
from steersman.processes import process_pool
from steersman.training import command
from steersman.training.world.build import CONFIGS, Folders, build_language_model, build_tokenizer
from steersman.training.world.language_model import SMALL
from steersman.training.world.pairs import draw_pairs, write_rows

_PROCESSES = 2


class Job(Protocol):
    """Something that is done once."""

    @property
    def done(self) -> bool:
        """Whether it need not be done again."""
        ...

    def __call__(self) -> None: ...


@dataclass(frozen=True)
class Run:
    """One `steersman train KIND --config CONFIG`, with flags over it."""

    kind: str
    config: str
    """Of `training/configs/`."""
    folder: Path
    """Where the model goes."""
    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether its model is there, or its head."""
        return any(self.folder.glob("*.safetensors"))

    def __call__(self) -> None:
        with logged(self.log):
            code = command.main([self.kind, *self.argv])
        if code:
            raise RuntimeError(f"steersman train {self.kind} ended with {code}: see {self.log}")

    @property
    def log(self) -> Path:
        """What training printed."""
        return self.folder.with_suffix(".log")

    @property
    def argv(self) -> list[str]:
        """Arguments of the command."""
        # What an interrupted run has left is begun anew.
        given = {"config": CONFIGS / self.config, "output_dir": self.folder, "overwrite_output_dir": True, **self.flags}
        return [part for flag, value in given.items() for part in (f"--{flag}", str(value))]


@dataclass(frozen=True)
class Pairs:
    """The first `count` preference pairs of a seed, as JSON lines."""

    path: Path
    count: int
    seed: int

    @property
    def done(self) -> bool:
        """Whether its file is there."""
        return self.path.is_file()

    def __call__(self) -> None:
        with logged(self.path.with_suffix(".log")):
            model = AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype="float32").eval()
            tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
            write_rows(draw_pairs(model, tokenizer, "reward", self.count, self.seed), self.path)


@dataclass(frozen=True)
class SmallLanguageModel:
    """The start of the demo world's reward models, `FOLDER/small-language-model`; it is not among what ships."""

    folder: Path

    @property
    def path(self) -> Path:
        """Of the checkpoint."""
        return Folders(WORLD, self.folder).language_model("small")

    @property
    def done(self) -> bool:
        """Whether it is there."""
        return (self.path / "model.safetensors").is_file()

    def __call__(self) -> None:
        folders = Folders(WORLD, self.folder)
        with logged(self.path.with_suffix(".log")):
            build_tokenizer(folders, seed=0)
            build_language_model(folders, "small", SMALL, seed=1)


def finish(jobs: Sequence[Job], progress: Progress, what: str) -> None:
    """Does those jobs that are not done yet, in their order, two at a time; the first failure ends it."""
    missing = [job for job in jobs if not job.done]
    if not missing:
        return
    task = progress.add_task(what, total=len(missing))
    with process_pool(_PROCESSES, one_thread) as pool:
        for step in as_completed([pool.submit(job) for job in missing]):
            step.result()
            progress.advance(task)


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """What a job prints goes to a file, not between the lines of a progress bar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        yield


def one_thread() -> None:
    """A process beside others: one thread, and no bars of its own."""
    torch.set_num_threads(1)
    disable_progress_bar()
