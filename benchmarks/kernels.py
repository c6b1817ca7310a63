"""`python -m steersman.benchmarks.kernels`: every kernel on a GPU against torch, torch.compile, vLLM and FlashInfer.

Each version is captured in a CUDA graph over several sets of random inputs, together larger than the L2 cache, so that
no set is found there and no launch waits for the host; a version that cannot be captured is timed eagerly and marked.
Each is timed twice, the second time in reverse order, and its outputs are compared with float64. Floors are bytes over
the copy rate of the same run. Results are written after every contest.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from steersman.benchmarks.common.rendering import BLUE, GREEN, GREY, ORANGE, RED, markdown, terminal
from steersman.benchmarks.common.results import RESULTS, write_json
from steersman.benchmarks.contests import COMPILED, EAGER, OURS, Contest, Inputs, Version, all_contests
from steersman.guidance.graphs import CudaCapture

_INPUT_BYTES = 4 * 60 * 2**20
_LEAST_SETS, _MOST_SETS = 4, 64
_REPLAYS = 50


@dataclass(frozen=True)
class Timed:
    """One version of one contest."""

    kernel: str
    shape: str
    rows: int
    version: str
    microseconds: float
    """Median of a call."""
    again: float
    """The same, measured once more after all others."""
    captured: bool
    """Whether it ran from a CUDA graph."""
    floor_bytes: int
    error: float
    """The largest error of an output over its size; infinite where an entry is finite that should not be."""
    right: bool
    """Whether the error is within the contest's limit."""


@dataclass(frozen=True)
class Device:
    """What floors are made of."""

    name: str
    bytes_per_second: float
    """Of a copy, read and written bytes counted."""
    empty_launch_microseconds: float


Timer = Callable[[Version, list[Inputs]], tuple[float, bool]]
"""A version and its sets of inputs → µs a call, and whether it was captured."""


def main(argv: Sequence[str]) -> int:
    """Measures, prints a table, and writes JSON, Markdown and a plot; 1 where a version of ours is wrong."""
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
    timed: list[Timed] = []
    for contest in track(contests, "kernels", console=console):
        timed += run_contest(contest, time_calls)
        write_json(args.out.with_suffix(".json"), as_json(timed, device))
    write_results(args.out, timed, device, console)
    return int(any(row.version == OURS and not row.right for row in timed))


def run_contest(
    contest: Contest, timer: Timer, versions: Sequence[str] = (), sets_of_inputs: int | None = None
) -> list[Timed]:
    """Times the named versions, by default all, forwards and then backwards, and measures their errors.

    sets_of_inputs: by default as many as are larger than the L2 cache.
    """
    wanted = sets_of_inputs or count_sets(contest.make_inputs())
    sets = [contest.make_inputs() for _ in range(wanted)]
    names = [name for name in contest.versions if not versions or name in versions]
    # What was compiled for other shapes would count towards the limit beyond which torch gives up compiling.
    torch.compiler.reset()
    errors = {name: measure_error(contest, contest.versions[name], sets[0]) for name in names}
    found = {name: [timer(contest.versions[name], sets)] for name in names}
    for name in reversed(names):
        found[name].append(timer(contest.versions[name], sets))
    return [
        Timed(
            *(contest.kernel, contest.shape, contest.rows, name, first, again, captured, contest.floor_bytes),
            *(errors[name], errors[name] <= contest.limit),
        )
        for name, [(first, captured), (again, _)] in found.items()
    ]


def measure_error(contest: Contest, version: Version, inputs: Inputs) -> float:
    """The largest ‖own − exact‖ / ‖exact‖ among the outputs that are compared."""
    own, exact = version(*_copy(inputs)), contest.truth(*_copy(inputs))
    compared = [n for n in range(len(own)) if n not in contest.unordered]
    return max((relative_error(own[n], exact[n]) for n in compared), default=0.0)


def relative_error(own: torch.Tensor, exact: torch.Tensor) -> float:
    """‖own − exact‖ / ‖exact‖ over finite entries; infinite where others are finite than should be."""
    own, exact = own.double(), exact.double()
    finite = exact.isfinite()
    if not torch.equal(own.isfinite(), finite) or not torch.equal(own[~finite], exact[~finite]):
        return math.inf
    return float((own[finite] - exact[finite]).norm() / exact[finite].norm().clamp(min=1e-30))


def _copy(inputs: Inputs) -> Inputs:
    return tuple(value.clone() if isinstance(value, torch.Tensor) else value for value in inputs)


def count_sets(inputs: Inputs) -> int:
    """Sets of inputs that together are several times larger than the L2 cache."""
    size = sum(t.numel() * t.element_size() for t in inputs if isinstance(t, torch.Tensor))
    return max(_LEAST_SETS, min(_MOST_SETS, math.ceil(_INPUT_BYTES / max(size, 1))))


def time_calls(version: Version, sets: list[Inputs]) -> tuple[float, bool]:
    """Median µs of a call over all sets, and whether they were captured."""

    def run() -> torch.Tensor:
        return [version(*inputs)[0] for inputs in sets][-1]

    replay = _capture(run)
    whole = statistics.median(_time(replay or run) for _ in range(_REPLAYS))
    return whole / len(sets), replay is not None


def time_on_host(version: Version, sets: list[Inputs]) -> tuple[float, bool]:
    """Median µs of a call by the host's clock: what a rehearsal without a GPU has."""
    took = []
    for inputs in sets:
        began = time.perf_counter()
        version(*inputs)
        took.append(1e6 * (time.perf_counter() - began))
    return statistics.median(took), False


def _capture(run: Callable[[], torch.Tensor]) -> Callable[[], None] | None:
    """What replays the launches of `run`, or None where it does what cannot be captured."""
    try:
        return CudaCapture(torch.device("cuda", torch.cuda.current_device()))(run).replay
    except RuntimeError:
        return None


def measure_device() -> Device:
    """Copy rate over tensors of a gigabyte, and what an empty launch costs in a graph."""
    rate = _measure_copies()
    # torch would keep the two gigabytes, and an engine that is started next has to do without them.
    torch.cuda.empty_cache()
    tiny = torch.zeros(1, device="cuda")
    empty, _ = time_calls(lambda value: (value.add_(1),), [(tiny,)] * _MOST_SETS)
    return Device(torch.cuda.get_device_name(), rate, empty)


def _measure_copies() -> float:
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    microseconds = statistics.median(_time(lambda: target.copy_(source)) for _ in range(20))
    return 2 * len(source) / microseconds * 1e6


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
        "error": [f"{row.error:.0e}" + ("" if row.right else " WRONG") for row in timed],
    }


def over_floor(row: Timed, device: Device) -> float:
    """Time over that of moving the least bytes at the copy rate."""
    return row.microseconds / (1e6 * row.floor_bytes / device.bytes_per_second)


def as_json(timed: Sequence[Timed], device: Device) -> dict[str, Any]:
    """The body of a result file."""
    return {"device": asdict(device), "timed": [asdict(row) for row in timed]}


def write_results(out: Path, timed: Sequence[Timed], device: Device, console: Console) -> None:
    """`out`.json, .md and .png, and the table on the terminal."""
    rows = table(timed, device)
    title = (
        f"{device.name}: copy {device.bytes_per_second / 1e12:.2f} TB/s, empty launch "
        f"{device.empty_launch_microseconds:.1f} µs"
    )
    console.print(terminal(rows, title))
    write_json(out.with_suffix(".json"), as_json(timed, device))
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
