"""Policies of several training seeds: seed 0 ships with the demo world, `steersman train dpo` trains the others."""

from pathlib import Path

from rich.progress import Progress

from steersman.benchmarks.runs import Pairs, Run, finish
from steersman.demo import MODELS
from steersman.training.world.build import POLICIES

SEEDS = (0, 1, 2)
REPEATED = ("dpo", "dpo-50", "dpo-25")
"""Policies of which every seed has one; the others exist for seed 0 only."""

_PAIRS = 6000


def policy_folder(work: Path, name: str, seed: int) -> Path:
    """Where a policy lies: seed 0's among the demo's models, the others' under `work`."""
    return MODELS / name if seed == 0 else work / f"seed{seed}" / name


def train_missing(work: Path, progress: Progress) -> None:
    """Trains every policy of `REPEATED` that is not there yet."""
    # By name first, so that both seeds of a policy are there if the rest is interrupted.
    runs = [_run(work, name, seed) for name in REPEATED for seed in SEEDS[1:]]
    seeds = [seed for seed in SEEDS[1:] if not all(run.done for run in runs if run.flags["seed"] == seed)]
    finish([Pairs(_pairs(work, seed), _PAIRS, seed) for seed in seeds], progress, "drawing pairs")
    finish(runs, progress, "training policies")


def _run(work: Path, name: str, seed: int) -> Run:
    flags = {
        **{"model": MODELS / "base", "train_file": _pairs(work, seed), "validation_file": ""},
        **{"keep": POLICIES[name], "seed": seed},
    }
    return Run("dpo", "dpo.yaml", policy_folder(work, name, seed), flags)


def _pairs(work: Path, seed: int) -> Path:
    return work / f"seed{seed}" / "reward_pairs.jsonl"
