"""`python -m steersman.benchmarks.kernels`: every kernel on a GPU against torch, torch.compile, vLLM and FlashInfer.

Each version is captured in a CUDA graph over several sets of random inputs, together larger than the L2 cache, so that
no set is found there and no launch waits for the host; versions that cannot be captured are timed eagerly and marked.
Each is timed twice, the second time in reverse order. Floors are bytes over the copy rate of the same run.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from steersman.benchmarks.common import RESULTS, write_json
from steersman.benchmarks.contests import COMPILED, EAGER, OURS, Contest, Inputs, Version, all_contests
from steersman.benchmarks.tables import BLUE, GREEN, GREY, ORANGE, RED, markdown, terminal

_INPUT_BYTES = 4 * 60 * 2**20
_LEAST_SETS, _MOST_SETS = 4, 64
_REPLAYS = 50


@dataclass(frozen=True)
class Timed:
    """One version of one contest."""

    kernel: str
    shape: str
    version: str
    microseconds: float
    """Median of a call."""
    again: float
    """The same, measured once more after all others."""
    captured: bool
    """Whether it ran from a CUDA graph."""
    floor_bytes: int


@dataclass(frozen=True)
class Device:
    """What floors are made of."""

    name: str
    bytes_per_second: float
    """Of a copy, read and written bytes counted."""
    empty_launch_microseconds: float


def main(argv: Sequence[str]) -> int:
    """Measures, prints a table, and writes JSON, Markdown and a plot."""
    parser = argparse.ArgumentParser(prog="python -m steersman.benchmarks.kernels", description=__doc__)
    parser.add_argument("--only", default="", help="Only kernels whose name contains this.")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels")
    args = parser.parse_args(list(argv))
    if not torch.cuda.is_available():
        print("steersman: benchmarks.kernels needs a GPU; torch finds none", file=sys.stderr)
        return 2
    console = Console()
    device = measure_device()
    contests = [c for c in all_contests(torch.device("cuda")) if args.only in c.kernel]
    timed = [row for contest in track(contests, "kernels", console=console) for row in run_contest(contest, time_calls)]
    write_results(args.out, timed, device, console)
    return 0


def run_contest(contest: Contest, time: Callable[[Version, list[Inputs]], tuple[float, bool]]) -> list[Timed]:
    """Times every version twice, forwards and backwards. time: a version and its sets of inputs → µs a call, and
    whether it was captured."""
    sets = [contest.make_inputs() for _ in range(count_sets(contest.make_inputs()))]
    names = list(contest.versions)
    found = {name: [time(contest.versions[name], sets)] for name in names}
    for name in reversed(names):
        found[name].append(time(contest.versions[name], sets))
    return [
        Timed(contest.kernel, contest.shape, name, first, again, captured, contest.floor_bytes)
        for name, [(first, captured), (again, _)] in found.items()
    ]


def count_sets(inputs: Inputs) -> int:
    """Sets of inputs that together are several times larger than the L2 cache."""
    size = sum(t.numel() * t.element_size() for t in inputs if isinstance(t, torch.Tensor))
    return max(_LEAST_SETS, min(_MOST_SETS, math.ceil(_INPUT_BYTES / max(size, 1))))


def time_calls(version: Version, sets: list[Inputs]) -> tuple[float, bool]:
    """Median µs of a call over all sets, and whether they were captured."""
    for inputs in sets[:3]:
        version(*inputs)
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for inputs in sets:
                version(*inputs)
        run, captured = graph.replay, True
    except RuntimeError:
        torch.cuda.synchronize()

        def run() -> None:
            for inputs in sets:
                version(*inputs)

        captured = False
    return statistics.median(_time(run) for _ in range(_REPLAYS)) / len(sets), captured


def measure_device() -> Device:
    """Copy rate over tensors of a gigabyte, and what an empty launch costs in a graph."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = statistics.median(_time(lambda: target.copy_(source)) for _ in range(20))
    tiny = torch.zeros(1, device="cuda")
    empty, _ = time_calls(lambda value: value.add_(1), [(tiny,)] * _MOST_SETS)
    return Device(torch.cuda.get_device_name(), 2 * len(source) / copy * 1e6, empty)


def _time(run: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)


def table(timed: Sequence[Timed], device: Device) -> dict[str, list[str]]:
    """Headings and cells, a row for each version."""
    return {
        "kernel": [row.kernel for row in timed],
        "shape": [row.shape for row in timed],
        "version": [row.version + ("" if row.captured else " (eager)") for row in timed],
        "µs": [f"{row.microseconds:.1f}" for row in timed],
        "again": [f"{row.again:.1f}" for row in timed],
        "GB/s": [f"{row.floor_bytes / row.microseconds / 1e3:.0f}" for row in timed],
        "over floor": [f"{over_floor(row, device):.2f}" for row in timed],
    }


def over_floor(row: Timed, device: Device) -> float:
    """Time over that of moving the least bytes at the copy rate."""
    return row.microseconds / (1e6 * row.floor_bytes / device.bytes_per_second)


def write_results(out: Path, timed: Sequence[Timed], device: Device, console: Console) -> None:
    """`out`.json, .md and .png, and the table on the terminal."""
    rows = table(timed, device)
    title = (
        f"{device.name}: copy {device.bytes_per_second / 1e12:.2f} TB/s, empty launch "
        f"{device.empty_launch_microseconds:.1f} µs"
    )
    console.print(terminal(rows, title))
    write_json(out.with_suffix(".json"), {"device": asdict(device), "timed": [asdict(row) for row in timed]})
    out.with_suffix(".md").write_text(f"# Kernels\n\n{title}.\n\n{markdown(rows)}\n![Kernels]({out.stem}.png)\n")
    plot(timed, device, out.with_suffix(".png"))
    console.print(f"written: {out}.json, .md and .png")


def plot(timed: Sequence[Timed], device: Device, path: Path) -> None:
    """Achieved bytes a second over the least bytes of a call, beside the roof."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {OURS: BLUE, EAGER: GREY, COMPILED: ORANGE}
    others = [name for name in dict.fromkeys(row.version for row in timed) if name not in colours]
    colours |= dict(zip(others, (RED, GREEN), strict=False))
    figure, axis = plt.subplots(figsize=(9, 5.4))
    sizes = sorted({row.floor_bytes for row in timed})
    launch = 1e-6 * device.empty_launch_microseconds
    roof = [size / (launch + size / device.bytes_per_second) / 1e9 for size in sizes]
    axis.plot(sizes, roof, color="black", linewidth=0.8, label="one empty launch + copy rate")
    for name, colour in colours.items():
        own = [row for row in timed if row.version == name]
        rates = [row.floor_bytes / row.microseconds / 1e3 for row in own]
        axis.plot([row.floor_bytes for row in own], rates, "o", color=colour, label=name, alpha=0.8)
    axis.set(xscale="log", yscale="log", xlabel="bytes that must move", ylabel="GB/s", title=device.name)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
