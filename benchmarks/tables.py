"""Tables of settings and their pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steersman.benchmarks.answers import Answers, Summary, by_prompt
from steersman.benchmarks.common.rendering import BLUE, ORANGE
from steersman.benchmarks.statistics import Estimate, wilcoxon


def columns(rows: Sequence[Summary]) -> dict[str, list[str]]:
    """Heading → cells, one for each row; what no row has is left out."""
    cells: dict[str, list[str]] = {
        "setting": [row.name for row in rows],
        "gold reward": [_cell(row.gold) for row in rows],
        "judge": [_cell(row.judge) for row in rows],
        "KL, nats": [_cell(row.kl) for row in rows],
        "tokens": [f"{row.tokens.mean:.0f}" for row in rows],
        "finished": [f"{row.finished:.0%}" for row in rows],
        "distinct": [f"{row.distinct:.0%}" for row in rows],
        "ROUGE-L between samples": [_cell(row.rouge_l) for row in rows],
        "auxiliary tokens a token": [f"{row.auxiliary_tokens:.1f}" for row in rows],
        "saved by gates": [f"{row.saved_tokens:.1f}" if row.saved_tokens else "" for row in rows],
    }
    return {heading: column for heading, column in cells.items() if any(column)}


def compare(answers: dict[str, Answers]) -> list[dict[str, Any]]:
    """One-sided Wilcoxon signed-rank tests over the same prompts, for every ordered pair of settings."""
    tests = []
    for measure in ("gold", "judge"):
        means = {name: by_prompt(rows, measure) for name, rows in answers.items()}
        for better, values in means.items():
            for other, others in means.items():
                if better != other and values is not None and others is not None:
                    difference = sum(values) / len(values) - sum(others) / len(others)
                    p = wilcoxon(values, others)
                    tests.append({"better": better, "than": other, "by": measure, "difference": difference, "p": p})
    return tests


def p_matrix(tests: Sequence[dict[str, Any]], measure: str) -> dict[str, list[str]]:
    """p of "the row's setting is better than the column's" by a measure, with few digits."""
    p = {(test["better"], test["than"]): test["p"] for test in tests if test["by"] == measure}
    names = list(dict.fromkeys(better for better, _ in p))
    return {
        f"{measure}: row above column, p": names,
        **{than: ["" if name == than else f"{p[name, than]:.1g}" for name in names] for than in names},
    }


def plot_settings(rows: Sequence[Summary], path: Path) -> None:
    """Gold and the judge by setting and, where it is known, over the KL from the base."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measures = [m for m in ("gold", "judge") if all(getattr(row, m) is not None for row in rows)] or ["tokens"]
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.6 + 0.45 * len(rows)))
    height = 0.8 / len(measures)
    for n, (measure, colour) in enumerate(zip(measures, (BLUE, ORANGE), strict=False)):
        values: list[Estimate] = [getattr(row, measure) for row in rows]
        places = [place + n * height for place in range(len(rows))]
        axes[0].barh(
            places,
            [v.mean for v in values],
            height,
            xerr=[v.standard_error for v in values],
            color=colour,
            label=measure,
        )
    axes[0].set_yticks([place + (len(measures) - 1) * height / 2 for place in range(len(rows))])
    axes[0].set_yticklabels([row.name for row in rows])
    axes[0].invert_yaxis()
    axes[0].set_title("Mean and standard error over prompts")
    axes[0].legend(fontsize=8)
    for n, row in enumerate(rows):
        if row.kl is not None:
            value: Estimate = getattr(row, measures[0])
            axes[1].errorbar(row.kl.mean, value.mean, value.standard_error, row.kl.standard_error, "o", color=f"C{n}")
            axes[1].annotate(row.name, (row.kl.mean, value.mean), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes[1].margins(x=0.25)
    axes[1].set(xlabel="KL from the base, nats an answer", ylabel=measures[0])
    axes[1].set_title("What was gained over how far was gone")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _cell(value: Estimate | float | None) -> str:
    return "" if value is None else f"{value:.2f}"
