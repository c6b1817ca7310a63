"""The picture of a GPU day: guided steps over plain ones, and kernels over their floors, beside the goals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steersman.benchmarks.common.rendering import BLUE, GREEN, GREY, ORANGE, RED, VIOLET

_COLOURS = (BLUE, GREEN, ORANGE, RED, VIOLET)


def draw(
    findings: Sequence[dict[str, Any]], title: str, path: Path, step_goals: Mapping[str, float], kernel_goal: float
) -> None:
    """Draws what has been found so far; a panel is empty where its stage was not reached."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(14, 6), width_ratios=(2, 3))
    _draw_steps(axes[0], [f for f in findings if f["stage"] == "step" and f["what"] == "step"], step_goals)
    _draw_kernels(axes[1], [f for f in findings if f["stage"] == "kernels" and f["what"] == "timed"], kernel_goal)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_steps(axis: Any, steps: Sequence[dict[str, Any]], goals: Mapping[str, float]) -> None:
    """A mark a method and number of sequences, dots for rounds, a dashed line for a method's goal."""
    guided = [method for method in dict.fromkeys(found["method"] for found in steps) if method != "plain"]
    sequences = sorted({found["sequences"] for found in steps})
    width = 0.8 / max(1, len(guided))
    for n, method in enumerate(guided):
        colour = _COLOURS[n % len(_COLOURS)]
        for found in (found for found in steps if found["method"] == method):
            place = sequences.index(found["sequences"]) + (n - (len(guided) - 1) / 2) * width
            label = method if found["sequences"] == sequences[0] else None
            axis.plot([place] * len(found["ratios"]), found["ratios"], ".", color=GREY, markersize=5)
            axis.plot(place, found["over_plain"], "o", color=colour, label=label, markersize=8)
        if method in goals:
            axis.axhline(goals[method], color=colour, linestyle="--", linewidth=1)
    axis.axhline(1, color=GREY, linewidth=0.8)
    axis.set_xticks(range(len(sequences)), [str(count) for count in sequences])
    axis.set(xlabel="sequences", ylabel="a guided step over a plain one", title="Grey: rounds. Dashed: goals.")
    if guided:
        _place_legend(axis)


def _draw_kernels(axis: Any, timed: Sequence[dict[str, Any]], goal: float) -> None:
    """A line a contest: our time over the floor, and the rivals'."""
    contests = list(dict.fromkeys((found["kernel"], found["shape"]) for found in timed))
    versions = list(dict.fromkeys(found["version"] for found in timed))
    for n, version in enumerate(versions):
        own = [found for found in timed if found["version"] == version]
        places = [contests.index((found["kernel"], found["shape"])) for found in own]
        marker = "o" if n == 0 else "x"
        axis.plot(
            [found["over_floor"] for found in own], places, marker, color=_COLOURS[n % len(_COLOURS)], label=version
        )
    axis.axvline(1, color=GREY, linewidth=0.8)
    axis.axvline(goal, color=GREY, linestyle="--", linewidth=1)
    axis.set_yticks(range(len(contests)), [f"{kernel} {shape}" for kernel, shape in contests], fontsize=7)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="time over the floor (bytes that must move at the copy rate)")
    if versions:
        _place_legend(axis)


def _place_legend(axis: Any) -> None:
    """Below the panel, where it covers nothing."""
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=3, frameon=False)
