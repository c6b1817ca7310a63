"""What a soak came to: whether memory and latency stayed flat after the warm-up."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from steersman.benchmarks.common.rendering import BLUE, GREEN, GREY, ORANGE, RED, VIOLET
from steersman.benchmarks.sweep import Finding

WARM_UP = 0.2
"""Of the whole time; the rest is compared in windows of a fifth of it."""
_WINDOWS = 5
MEMORY_GROWTH, LATENCY_GROWTH = 0.05, 0.25
"""What still counts as flat: the last window over the first."""


@dataclass(frozen=True)
class Sample:
    """Bytes by process at a time."""

    at: float
    memory: Mapping[str, int]


@dataclass(frozen=True)
class Done:
    """One request, when it had ended. Times are seconds."""

    at: float
    method: str
    hung_up: bool
    error: str
    gaps: tuple[float, ...]


@dataclass
class Soak:
    """Everything that was seen."""

    concurrency: int
    memory: list[Sample] = field(default_factory=list)
    done: list[Done] = field(default_factory=list)
    blocks_left: float = 0.0


def find(soak: Soak) -> Finding:
    """Tables, verdicts and pictures."""
    end = soak.memory[-1].at
    edges = [end * (WARM_UP + (1 - WARM_UP) * n / _WINDOWS) for n in range(_WINDOWS + 1)]
    memory = {name: _windows(_series(soak, name), edges) for name in soak.memory[-1].memory}
    gaps = [(done.at, gap) for done in soak.done for gap in done.gaps]
    latency = {
        "median, ms": _windows(gaps, edges, lambda values: 1e3 * statistics.median(values)),
        "99th percentile, ms": _windows(gaps, edges, lambda values: 1e3 * _quantile(values, 0.99)),
    }
    errors = Counter(done.error for done in soak.done if done.error)
    grown = {name: values[-1] / values[0] - 1 for name, values in memory.items()}
    slower = {name: values[-1] / values[0] - 1 for name, values in latency.items()}
    flat = {
        "no error": not errors,
        f"memory within {MEMORY_GROWTH:.0%}": all(abs(growth) <= MEMORY_GROWTH for growth in grown.values()),
        f"99th percentile within {LATENCY_GROWTH:.0%}": slower["99th percentile, ms"] <= LATENCY_GROWTH,
        "auxiliary blocks back to 0": soak.blocks_left == 0,
    }
    kinds = Counter(done.method for done in soak.done)
    hung_up = sum(done.hung_up for done in soak.done)
    sentences = (
        f"{len(soak.done)} requests in {end / 60:.0f} minutes at concurrency {soak.concurrency}, {hung_up} hung up "
        f"in the middle; {sum(errors.values())} errors; {soak.blocks_left:.0f} auxiliary blocks held at the end.",
        *(f"{name}: {'yes' if held else 'NO'}." for name, held in flat.items()),
    )
    return Finding(
        "Soak",
        (
            {"requests of": list(kinds), "ended": [str(count) for count in kinds.values()]},
            _table("memory, MiB", memory, grown, 2**20),
            _table("time between chunks", latency, slower, 1),
        ),
        sentences,
        f"Memory: what each process alone holds (unique set). After a warm-up of {WARM_UP:.0%} the time is cut in "
        f"{_WINDOWS} windows; growth is the last over the first.",
        {
            "flat": all(flat.values()),
            "memory": memory,
            "latency": latency,
            "errors": dict(errors),
            "requests": dict(kinds),
        },
        lambda figure: _draw(figure, soak, edges),
    )


def _series(soak: Soak, name: str) -> list[tuple[float, float]]:
    return [(sample.at, float(sample.memory[name])) for sample in soak.memory if name in sample.memory]


def _windows(
    values: Sequence[tuple[float, float]], edges: Sequence[float], reduce: Any = statistics.mean
) -> list[float]:
    return [reduce([value for at, value in values if low <= at < high]) for low, high in pairwise(edges)]


def _quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def _table(
    title: str, windows: Mapping[str, Sequence[float]], grown: Mapping[str, float], unit: float
) -> dict[str, list[str]]:
    columns = {f"window {n + 1}": [f"{values[n] / unit:.1f}" for values in windows.values()] for n in range(_WINDOWS)}
    return {title: list(windows), **columns, "growth": [f"{grown[name]:+.1%}" for name in windows]}


def _draw(figure: Any, soak: Soak, edges: Sequence[float]) -> None:
    left, right = figure.subplots(1, 2)
    for name, colour in zip(soak.memory[-1].memory, (BLUE, ORANGE, GREEN, RED, VIOLET, GREY), strict=False):
        series = _series(soak, name)
        left.plot([at / 60 for at, _ in series], [value / 2**20 for _, value in series], color=colour, label=name)
    left.set(xlabel="minutes", ylabel="MiB", title="Memory of each process")
    left.set_ylim(bottom=0)
    left.legend(fontsize=8)
    minutes = range(int(soak.memory[-1].at / 60) + 1)
    by_minute: dict[int, list[float]] = {minute: [] for minute in minutes}
    for done in soak.done:
        by_minute.setdefault(int(done.at / 60), []).extend(1e3 * gap for gap in done.gaps)
    shown = {minute: values for minute, values in by_minute.items() if values}
    for q, colour in ((0.5, BLUE), (0.99, RED)):
        right.plot(
            [m + 0.5 for m in shown], [_quantile(v, q) for v in shown.values()], color=colour, label=f"p{100 * q:g}"
        )
    right.set(xlabel="minutes", ylabel="ms", title="Time between chunks of a stream")
    right.set_ylim(bottom=0)
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.axvspan(0, edges[0] / 60, color=GREY, alpha=0.15)
