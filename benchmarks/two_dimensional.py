"""`python -m steersman.benchmarks.two_dimensional`: 2D-DPO beside other preference optimisation, on scored sentences.

Three seeds; a seed draws preference pairs of its own, on which every method trains for as many steps. Learning rates
are tuned with seed 0 on other prompts than reported. About 50 minutes on 2 cores; what is there is not done again.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from steersman.benchmarks import two_dimensional_tables
from steersman.benchmarks.common.results import RESULTS
from steersman.benchmarks.policy_measures import MeasurePolicy
from steersman.benchmarks.quality import progress_bar
from steersman.benchmarks.runs import Pairs, Run, finish
from steersman.benchmarks.two_dimensional_tables import METHODS, RATES, Measured
from steersman.demo import MODELS

SEEDS = (0, 1, 2)
_TUNING = 200


@dataclass(frozen=True)
class Benchmark:
    """Where everything lies, and how much of it there is."""

    work: Path
    pairs: int
    prompts: int

    def data(self, seed: int) -> Pairs:
        """A seed's preference pairs."""
        return Pairs(self.work / f"seed{seed}" / "pairs.jsonl", self.pairs, seed)

    def run(self, name: str, seed: int, rate: float) -> Run:
        """The training of a method, which leaves a checkpoint at every quarter."""
        method = METHODS[name]
        flags: dict[str, Any] = {
            **{"model": MODELS / "base", "train_file": self.data(seed).path, "validation_file": "", "seed": seed},
            **{"learning_rate": rate, "save_strategy": "steps", "save_steps": 0.25, "save_only_model": True},
        }
        folder = self.work / f"seed{seed}" / f"{method.folder}-{round(rate * 1e6)}"  # millionths
        return Run("dpo", method.config, folder, flags | dict(method.flags))

    def tuning(self, name: str, rate: float) -> MeasurePolicy:
        """What answers to tuning prompts are worth."""
        return MeasurePolicy(self.run(name, SEEDS[0], rate).folder, "tuning", 0, _TUNING, 0)

    def reporting(self, folder: Path, seed: int) -> MeasurePolicy:
        """What answers to a seed's own prompts are worth, and what is known of pairs over training."""
        return MeasurePolicy(folder, "reporting", seed * self.prompts, self.prompts, seed)


def main(argv: Sequence[str]) -> int:
    """Writes RESULTS/two-dimensional.json, .md and .png."""
    parser = argparse.ArgumentParser(prog="python -m steersman.benchmarks.two_dimensional", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="Keep what is trained here, and use what is there.")
    parser.add_argument("--pairs", type=int, default=2000, help="Preference pairs of each seed.")
    parser.add_argument("--prompts", type=int, default=160, help="Reporting prompts of each seed, of 500 in all.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(list(argv))
    two_dimensional_tables.find(measure(Benchmark(args.work, args.pairs, args.prompts))).write(
        args.out / "two-dimensional", Console()
    )
    return 0


def measure(benchmark: Benchmark) -> Measured:
    """Trains and measures what has not been."""
    with progress_bar() as progress:
        finish([benchmark.data(seed) for seed in SEEDS], progress, "drawing pairs")
        grid = [(name, rate) for name in METHODS for rate in RATES]
        finish([benchmark.run(name, SEEDS[0], rate) for name, rate in grid], progress, "training at each rate")
        tunings = {(name, rate): benchmark.tuning(name, rate) for name, rate in grid}
        finish(list(tunings.values()), progress, "tuning rates")
        golds = {name: {rate: _gold(tunings[name, rate]) for rate in RATES} for name in METHODS}
        rates = {name: max(own, key=lambda rate: own[rate]) for name, own in golds.items()}
        runs = {(name, seed): benchmark.run(name, seed, rates[name]) for name in METHODS for seed in SEEDS}
        finish(list(runs.values()), progress, "training the other seeds")
        reports = {key: benchmark.reporting(run.folder, key[1]) for key, run in runs.items()}
        # The base lies among the demo's models: what is measured of it goes elsewhere.
        bases = [benchmark.reporting(MODELS / "base", seed).into(benchmark.work / f"seed{seed}") for seed in SEEDS]
        finish([*reports.values(), *bases], progress, "answers and pairs")
    return Measured(
        tuning=golds,
        rates=rates,
        reports={name: [reports[name, seed].read() for seed in SEEDS] for name in METHODS},
        base=[base.read() for base in bases],
        pairs=benchmark.pairs,
        prompts=benchmark.prompts,
    )


def _gold(tuning: MeasurePolicy) -> float:
    return float(tuning.read()["gold"]["total"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
