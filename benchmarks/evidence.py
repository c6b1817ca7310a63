"""`make evidence`: what the papers claim, measured in the demo world with three seeds; writes tables and pictures.

Policies of the other seeds are trained first. A seed has prompts of its own, on which nothing was tuned.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from steersman.benchmarks import frontier, signals, steering
from steersman.benchmarks.answers import Answers, connected
from steersman.benchmarks.common.demo import demo_server
from steersman.benchmarks.common.results import RESULTS
from steersman.benchmarks.quality import ask_shown, progress_bar
from steersman.benchmarks.runs import one_thread
from steersman.benchmarks.seeds import SEEDS, policy_folder, train_missing
from steersman.benchmarks.settings import Setting, world_prompts
from steersman.benchmarks.sweep import Finding, Sweep
from steersman.processes import process_pool

_PORT = 8033


@dataclass(frozen=True)
class Decoded:
    """A finding from answers of the server."""

    settings: Callable[[str], list[Setting]]
    """From the name of a seed's policy."""
    find: Callable[[Sweep], Finding]


DECODED = {
    "frontier": Decoded(frontier.frontier_settings, frontier.frontier),
    "positions": Decoded(frontier.frontier_settings, frontier.positions),
    "gates": Decoded(steering.gate_settings, steering.gates),
    "budget": Decoded(steering.budget_settings, steering.budgets),
}
READ = ("implicit", "truncated", "estimator")
"""Findings from the models alone."""


def main(argv: Sequence[str]) -> int:
    """Writes RESULTS/evidence-NAME.json, .md and .png for every finding."""
    parser = argparse.ArgumentParser(prog="python -m steersman.benchmarks.evidence", description=__doc__)
    parser.add_argument("--prompts", type=int, default=100, help="Prompts of each seed.")
    parser.add_argument("--only", nargs="+", choices=[*DECODED, *READ], default=[*DECODED, *READ])
    parser.add_argument("--work", type=Path, help="Keep the trained policies here, and use those that are there.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(list(argv))
    console, began = Console(), time.monotonic()
    with _folder(args.work) as work:
        with progress_bar() as progress:
            train_missing(work, progress)
        console.print(f"policies: {_minutes(began)}")
        for name, finding in _read(args.only, work).items():
            finding.write(args.out / f"evidence-{name}", console)
        console.print(f"models read: {_minutes(began)}")
        wanted = {name: DECODED[name] for name in args.only if name in DECODED}
        if wanted:
            sweep = _decode(list(wanted.values()), work, args.prompts)
            for name, part in wanted.items():
                part.find(sweep).write(args.out / f"evidence-{name}", console)
    console.print(f"done: {_minutes(began)}; written: {args.out}/evidence-*")
    return 0


def _read(wanted: Sequence[str], work: Path) -> dict[str, Finding]:
    findings = {}
    if {"implicit", "truncated"} & set(wanted):
        with process_pool(2, one_thread) as pool:
            policies = signals.measure_policies(work, pool)
        findings = {"implicit": signals.implicit(policies), "truncated": signals.truncated(policies)}
    if "estimator" in wanted:
        one_thread()
        findings["estimator"] = signals.estimator(signals.measure_agreement())
    return {name: finding for name, finding in findings.items() if name in wanted}


def _decode(parts: Sequence[Decoded], work: Path, count: int) -> Sweep:
    """Answers under every setting that a part asks for, once for each seed."""
    flags = [flag for seed in SEEDS for flag in ("--policy", f"{_policy(seed)}={policy_folder(work, 'dpo', seed)}")]
    with demo_server(None, _PORT, [*flags, "--guidance-cache", "0.5"]) as url:
        return asyncio.run(_ask_all(url, parts, count))


async def _ask_all(url: str, parts: Sequence[Decoded], count: int) -> Sweep:
    prompts = world_prompts("reporting")
    sweep: dict[str, list[Answers]] = {}
    async with connected(url, judge="judge") as server:
        with progress_bar() as progress:
            for seed in SEEDS:
                settings = {s.name: s for part in parts for s in part.settings(_policy(seed))}
                for own in settings.values():
                    answers = await ask_shown(
                        server, own, prompts[seed * count : (seed + 1) * count], progress, seed=seed
                    )
                    sweep.setdefault(own.name, []).append(answers)
    return sweep


def _policy(seed: int) -> str:
    return f"seed{seed}"


@contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _minutes(began: float) -> str:
    return f"{(time.monotonic() - began) / 60:.1f} minutes"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
