"""The picture beside a trained model: its accuracy over how much of the responses it sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steersman.training.checkpoints import PICTURE

BLUE, GREY = "#2a6f97", "#6c757d"


def draw_accuracy(folder: str | Path, facts: dict[str, Any], title: str) -> None:
    """Writes accuracy.png: a model's `accuracy` over the share of the longer response, with the binomial standard error
    of a measurement on n = `validation_pairs` pairs, √(p(1 − p)/n)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    accuracy, pairs = facts["accuracy"], facts["validation_pairs"]
    values = list(accuracy.values())
    errors = [(p * (1 - p) / pairs) ** 0.5 for p in values]
    figure, axes = plt.subplots(figsize=(6, 3.6))
    axes.axhline(0.5, color=GREY, linestyle=":", linewidth=1)
    axes.annotate("chance", (103, 0.5), xytext=(-3, 3), textcoords="offset points", ha="right", fontsize=8, color=GREY)
    shares = [100 * float(share) for share in accuracy]
    axes.errorbar(shares, values, yerr=errors, fmt="o-", color=BLUE, capsize=3)
    axes.set(xlim=(0, 103), ylim=(min(0.45, *values) - 0.02, 1.02), title=title)
    axes.set(xlabel="share of the longer response, %", ylabel=f"accuracy on {pairs} pairs")
    figure.tight_layout()
    figure.savefig(Path(folder) / PICTURE, dpi=100)
    plt.close(figure)
