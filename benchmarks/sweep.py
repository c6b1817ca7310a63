"""The same settings once for each seed: seeds differ in their prompts, in chance, and in the policy that decodes."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from steersman.benchmarks.answers import Answers, by_prompt
from steersman.benchmarks.common.rendering import markdown, terminal
from steersman.benchmarks.common.results import write_json
from steersman.benchmarks.settings import Setting
from steersman.benchmarks.statistics import Estimate, estimate

STRENGTH = 8.0
"""PARGS's β: the best for sampled answers on the tuning prompts, as `make evaluate` found it."""

BASE = Setting("base")


@dataclass(frozen=True)
class Curve:
    """Settings that differ in one number."""

    name: str
    symbol: str
    values: tuple[float, ...]
    make: Callable[[str, float], dict[str, Any]]
    """Guidance from the policy's name and the number."""

    def at(self, value: float) -> str:
        """How a setting of the curve is called."""
        return f"{self.name}, {self.symbol} = {value:g}"

    def settings(self, policy: str) -> list[Setting]:
        """The settings with a policy."""
        return [Setting(self.at(value), self.make(policy, value)) for value in self.values]

    @property
    def names(self) -> list[str]:
        """The settings' names, in the values' order."""
        return [self.at(value) for value in self.values]


Sweep = Mapping[str, Sequence[Answers]]
"""Setting's name → its answers for each seed."""


def of_seed(answers: Answers, measure: str) -> float:
    """The mean of a measure over prompts."""
    values = by_prompt(answers, measure)
    assert values is not None, measure
    return statistics.fmean(values)


def per_seed(sweep: Sweep, name: str, measure: str) -> list[float]:
    """A setting's mean over prompts, for each seed."""
    return [of_seed(answers, measure) for answers in sweep[name]]


def over_seeds(sweep: Sweep, name: str, measure: str) -> Estimate:
    """A setting's mean and standard error over seeds."""
    return estimate(per_seed(sweep, name, measure))


@dataclass(frozen=True)
class Finding:
    """What one part of the evidence comes to."""

    title: str
    tables: tuple[dict[str, list[str]], ...]
    sentences: tuple[str, ...]
    """What the numbers say, written from the numbers."""
    about: str
    """What its numbers are of."""
    data: dict[str, Any]
    draw: Callable[[Any], None] = field(repr=False)
    """Draws into a figure of matplotlib."""
    size: tuple[float, float] = (11.0, 4.4)

    def write(self, stem: Path, console: Console) -> None:
        """STEM.json, .md and .png, and the same on the terminal."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        write_json(stem.with_name(f"{stem.name}.json"), {"title": self.title, "findings": self.sentences, **self.data})
        lines = [f"# {self.title}\n", *(f"- {sentence}" for sentence in self.sentences), ""]
        lines += [*(markdown(table) for table in self.tables), f"{self.about}\n", f"![{self.title}]({stem.name}.png)\n"]
        stem.with_name(f"{stem.name}.md").write_text("\n".join(lines), encoding="utf-8")
        figure = plt.figure(figsize=self.size)
        self.draw(figure)
        figure.tight_layout()
        figure.savefig(stem.with_name(f"{stem.name}.png"), dpi=120)
        plt.close(figure)
        for table in self.tables:
            console.print(terminal(table, self.title))
        for sentence in self.sentences:
            console.print(f"• {sentence}")


MEASURES = ("gold", "judge", "kl", "tokens", "auxiliary_tokens")


def dump_sweep(sweep: Sweep, names: Sequence[str], measures: Sequence[str] = MEASURES) -> dict[str, Any]:
    """For JSON: each setting's means for each seed."""
    return {name: {measure: per_seed(sweep, name, measure) for measure in measures} for name in names}


def gap(sweep: Sweep, better: str, than: str, measure: str) -> Estimate:
    """By how much a setting exceeds another with the same seeds' models, over seeds."""
    ours, theirs = (per_seed(sweep, name, measure) for name in (better, than))
    return estimate([a - b for a, b in zip(ours, theirs, strict=True)])


def of_sweep(sweep: Sweep) -> str:
    """What the numbers of a sweep are of."""
    answers = next(iter(sweep.values()))
    seeds, prompts = len(answers), len(answers[0])
    return (
        f"Mean ± standard error over {seeds} seeds, each with {prompts} prompts of its own that nothing was tuned on, "
        "at temperature 1."
    )


def say(verdict: int, above: str, below: str, between: str) -> str:
    """The words for a verdict of an estimate."""
    return {1: above, -1: below, 0: between}[verdict]
