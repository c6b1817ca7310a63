"""Policies of several training seeds: seed 0 ships with the demo world, `steersman train dpo` trains the others.

Another seed draws other preference pairs with other label noise, and trains on them in another order.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from steersman.demo import MODELS
from steersman.training import dpo
from steersman.training.world.build import CONFIGS, POLICIES
from steersman.training.world.pairs import draw_pairs, write_rows

SEEDS = (0, 1, 2)
REPEATED = ("dpo", "dpo-50", "dpo-25")
"""Policies of which every seed has one; the others exist for seed 0 only."""

_PAIRS = 6000
_PROCESSES = 2


def policy_folder(work: Path, name: str, seed: int) -> Path:
    """Where a policy lies: seed 0's among the demo's models, the others' under `work`."""
    return MODELS / name if seed == 0 else work / f"seed{seed}" / name


def train_missing(work: Path, progress: Progress) -> None:
    """Trains every policy of `REPEATED` that is not there yet, one seed a process."""
    missing = {
        seed: names
        for seed in SEEDS[1:]
        if (names := [n for n in REPEATED if not (policy_folder(work, n, seed) / "model.safetensors").is_file()])
    }
    if not missing:
        return
    task = progress.add_task("training policies", total=sum(map(len, missing.values())))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(_PROCESSES, mp_context=context, initializer=one_thread) as pool:
        drawn = {pool.submit(_draw_pairs, work, seed): seed for seed in missing}
        for step in as_completed(drawn):
            step.result()
        # By name first, so that both seeds of a policy are there if the rest is interrupted.
        trained = [
            pool.submit(_train, work, name, seed) for name in REPEATED for seed in missing if name in missing[seed]
        ]
        for step in as_completed(trained):
            step.result()
            progress.advance(task)


def _draw_pairs(work: Path, seed: int) -> None:
    with _log(work, seed):
        model = AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype="float32").eval()
        tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
        write_rows(draw_pairs(model, tokenizer, "reward", _PAIRS, seed), _pairs(work, seed))


def _train(work: Path, name: str, seed: int) -> None:
    flags = {
        "config": CONFIGS / "dpo.yaml",
        "model": MODELS / "base",
        "train_file": _pairs(work, seed),
        "validation_file": "",
        "output_dir": policy_folder(work, name, seed),
        "keep": POLICIES[name],
        "seed": seed,
    }
    with _log(work, seed):
        code = dpo.main([part for flag, value in flags.items() for part in (f"--{flag}", str(value))])
    if code:
        raise RuntimeError(
            f"steersman train dpo: {name} with seed {seed} ended with {code}; see {work / f'seed{seed}'}"
        )


def _pairs(work: Path, seed: int) -> Path:
    return work / f"seed{seed}" / "reward_pairs.jsonl"


@contextmanager
def _log(work: Path, seed: int) -> Iterator[None]:
    """What training prints goes to a file, not between the lines of a progress bar."""
    folder = work / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        yield


def one_thread() -> None:
    """A process beside others: one thread, and no bars of its own."""
    torch.set_num_threads(1)
    disable_progress_bar()
