"""What methods of preference optimisation come to in the demo world: gold by aspect, and pairs over training."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from steersman.benchmarks.common.rendering import BLUE, GREEN, GREY, ORANGE, RED, VIOLET
from steersman.benchmarks.policy_measures import ASPECTS
from steersman.benchmarks.statistics import Estimate, estimate
from steersman.benchmarks.sweep import Finding, say

RATES = (2.5e-4, 5e-4, 1e-3)


@dataclass(frozen=True)
class Method:
    """`steersman train dpo --config CONFIG` with flags."""

    config: str
    folder: str
    colour: str
    flags: tuple[tuple[str, Any], ...] = ()


METHODS = {
    "2D-DPO": Method("dpo-2d.yaml", "2d", BLUE),
    "1D-DPO": Method("dpo-2d.yaml", "1d", ORANGE, (("method", "1d"), ("weights", '{"helpful": 1}'))),
    "DPO": Method("dpo-sft.yaml", "dpo", RED),
    "IPO": Method("dpo-ipo.yaml", "ipo", GREEN),
    "KTO": Method("dpo-kto.yaml", "kto", GREY),
    "ORPO": Method("dpo-orpo.yaml", "orpo", VIOLET),
    "SimPO": Method("dpo-simpo.yaml", "simpo", "#b5838d", (("cpo_alpha", 0.1),)),
    "TDPO₂": Method("dpo-tdpo.yaml", "tdpo2", "#bc9a2c", (("sft_weight", 0.1),)),
}
ORDER = ("2D-DPO", "1D-DPO", "DPO")
"""The paper's, best first."""


@dataclass(frozen=True)
class Measured:
    """Every method's policies of all seeds."""

    tuning: dict[str, dict[float, float]]
    """Method → learning rate → gold of answers to tuning prompts, seed 0."""
    rates: dict[str, float]
    """Method → the learning rate of most gold."""
    reports: dict[str, list[dict[str, Any]]]
    """Method → for each seed, what `MeasurePolicy` found on its reporting prompts."""
    base: list[dict[str, Any]]
    """The same of the base."""
    pairs: int
    prompts: int

    def gold(self, name: str, aspect: str = "total") -> list[float]:
        """For each seed."""
        return [report["gold"][aspect] for report in self.reports[name]]

    def over_training(self, name: str, measure: str) -> list[Estimate]:
        """Over seeds, at each quarter."""
        each = [[point[measure] for point in report["training"]] for report in self.reports[name]]
        return [estimate(values) for values in zip(*each, strict=True)]


def find(measured: Measured) -> Finding:
    """Tables, verdicts and figures of all of it."""
    names = list(METHODS)
    return Finding(
        "Two-dimensional supervision: 2D-DPO beside other preference optimisation",
        (_golds(measured), _pairs(measured), _tuning(measured)),
        (_order(measured), *(_gap(measured, "2D-DPO", other) for other in names[1:]), _gap(measured, "1D-DPO", "DPO")),
        f"Mean ± standard error over {len(measured.base)} seeds, each with {measured.pairs} preference pairs and "
        f"{measured.prompts} reporting prompts of its own, at temperature 1. All methods train on the same pairs for "
        "as many steps, at the learning rate of most gold with seed 0 on other prompts, with a tenth of an SFT loss on "
        "the chosen responses (ORPO has its own, KTO none). Labels of pairs are drawn with Bradley and Terry's noise; "
        "2D-DPO and 1D-DPO also read sentences' scores, one in ten of which is a point off. Accuracy and sequential KL "
        "are of the demo's test pairs, the better one by gold as the chosen.",
        {
            "rates": measured.rates,
            "tuning": {
                name: {f"{rate:g}": value for rate, value in own.items()} for name, own in measured.tuning.items()
            },
            "seeds": measured.reports,
            "base": measured.base,
        },
        lambda figure: _draw(figure, measured),
        (14.0, 4.8),
    )


def _golds(measured: Measured) -> dict[str, list[str]]:
    rows = {"base": measured.base, **measured.reports}
    found = {name: {part: [r["gold"][part] for r in own] for part in ("total", *ASPECTS)} for name, own in rows.items()}
    return {
        "trained by": list(rows),
        "gold reward": [f"{estimate(own['total']):.2f}" for own in found.values()],
        **{aspect: [f"{estimate(own[aspect]):.2f}" for own in found.values()] for aspect in ASPECTS},
        "KL, nats an answer": [f"{estimate([report['kl'] for report in own]):.1f}" for own in rows.values()],
        "tokens": [f"{estimate([report['tokens'] for report in own]):.0f}" for own in rows.values()],
    }


def _pairs(measured: Measured) -> dict[str, list[str]]:
    measures = {
        "accuracy of the implicit reward": ("accuracy", ".3f"),
        "sequential KL, chosen": ("sequential_kl_chosen", ".1f"),
        "sequential KL, rejected": ("sequential_kl_rejected", ".1f"),
    }
    return {
        "at the end of training by": list(METHODS),
        **{
            heading: [format(measured.over_training(name, measure)[-1], form) for name in METHODS]
            for heading, (measure, form) in measures.items()
        },
    }


def _tuning(measured: Measured) -> dict[str, list[str]]:
    return {
        "tuning prompts, seed 0": list(METHODS),
        **{f"gold at rate {rate:g}": [f"{measured.tuning[name][rate]:.2f}" for name in METHODS] for rate in RATES},
        "taken": [f"{measured.rates[name]:g}" for name in METHODS],
    }


def _difference(measured: Measured, better: str, than: str) -> Estimate:
    return estimate([a - b for a, b in zip(measured.gold(better), measured.gold(than), strict=True)])


def _gap(measured: Measured, better: str, than: str) -> str:
    gap = _difference(measured, better, than)
    words = say(gap.verdict, "better than", "worse than", "not clearly different from")
    return f"{better} is {words} {than} (gold {gap:+.2f} over the seeds)."


def _order(measured: Measured) -> str:
    """Whether each is above the next at the 5 % level."""
    gaps = [_difference(measured, better, than) for better, than in pairwise(ORDER)]
    order, means = " > ".join(ORDER), {name: estimate(measured.gold(name)).mean for name in ORDER}
    if all(gap.verdict == 1 for gap in gaps):
        return f"The paper's ordering, {order}, holds here."
    ours = " > ".join(sorted(ORDER, key=lambda name: -means[name]))
    if any(gap.verdict == -1 for gap in gaps):
        return f"The paper's ordering, {order}, does not hold here: by mean gold it is {ours}."
    return (
        f"The paper's ordering, {order}, is not established here: by mean gold it is {ours}, within the seeds' noise."
    )


def _draw(figure: Any, measured: Measured) -> None:
    left, middle, right = figure.subplots(1, 3)
    names = list(METHODS)
    golds = [estimate(measured.gold(name)) for name in names]
    colours = [METHODS[name].colour for name in names]
    left.bar(names, [g.mean for g in golds], yerr=[g.standard_error for g in golds], color=colours, capsize=3)
    left.axhline(
        estimate([own["gold"]["total"] for own in measured.base]).mean, color=GREY, linestyle=":", label="base"
    )
    left.tick_params(axis="x", rotation=45)
    left.set_title("Gold reward of answers")
    left.legend(fontsize=8)
    for axis, measure, title in (
        (middle, "accuracy", "Accuracy of the implicit reward"),
        (right, "sequential_kl_chosen", "Sequential KL of the chosen, nats"),
    ):
        for name in names:
            _line(axis, measured.over_training(name, measure), name)
        axis.set(title=title, xlabel="share of training")
    middle.legend(fontsize=7)


def _line(axis: Any, values: Sequence[Estimate], name: str) -> None:
    shares = [(n + 1) / len(values) for n in range(len(values))]
    means, errors = [v.mean for v in values], [v.standard_error for v in values]
    axis.errorbar(shares, means, errors, fmt="o-", color=METHODS[name].colour, capsize=2, markersize=3, label=name)
