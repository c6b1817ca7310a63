"""What objectives come to: a table of all, and what training on the beginnings of responses costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steersman.benchmarks.answers import Answers
from steersman.benchmarks.common.rendering import BLUE, GREY, ORANGE
from steersman.benchmarks.statistics import Estimate, estimate
from steersman.benchmarks.sweep import BASE, Finding, dump_sweep, gap, of_sweep, over_seeds, say
from steersman.training.prefixes import SHARES


@dataclass(frozen=True)
class Method:
    """A way to train what steers, and to steer by it."""

    kind: str
    config: str
    """Of `training/configs/`."""
    folder: str
    """Of its models; methods with the same one decode with the same models."""
    flags: tuple[tuple[str, Any], ...] = ()
    teacher: str | None = None
    """Folder of the reward model that it learns from."""
    trl: bool = False
    """By TRL's own trainer."""
    end_token: bool = False
    """Candidates are scored as if the answer ended there."""


def _reward(name: str, folder: str | None = None, **options: Any) -> Method:
    return Method("reward", f"reward-{name}.yaml", folder or name, **options)


def _kept(kind: str, config: str, percent: int) -> Method:
    return Method(kind, config, f"{config.removesuffix('.yaml')}-{percent}", (("keep", percent / 100),))


_ENDED = ", with end token"
METHODS = {
    "full, TRL": _reward("full", "trl-full", trl=True),
    "full": _reward("full"),
    f"full{_ENDED}": _reward("full", end_token=True),
    **{f"truncated to {p} %": _kept("reward", "reward-truncated.yaml", p) for p in (50, 40, 33, 25)},
    "scaled": _reward("scaled"),
    f"scaled{_ENDED}": _reward("scaled", end_token=True),
    "regression": _reward("regression"),
    f"regression{_ENDED}": _reward("regression", end_token=True),
    "aspects": _reward("aspects"),
    "partial, subset": _reward("partial", "partial-subset", flags=(("prefixes", "subset"),)),
    "partial, causal": _reward("partial", flags=(("prefixes", "causal"),)),
    "prefix value": _reward("prefix-value", teacher="full"),
    "vocabulary": _reward("vocabulary"),
    "distilled": _reward("distilled", teacher="partial"),
    # TRL's own rows have no length to be grouped by.
    "DPO, TRL": Method("dpo", "dpo.yaml", "trl-dpo", (("train_sampling_strategy", "random"),), trl=True),
    "DPO": Method("dpo", "dpo.yaml", "dpo"),
    **{f"DPO on {p} %": _kept("dpo", "dpo.yaml", p) for p in (50, 40, 33, 25)},
}
TRUNCATED = {
    "reward model": ("full", "truncated to 50 %", "truncated to 40 %", "truncated to 33 %", "truncated to 25 %"),
    "DPO": ("DPO", "DPO on 50 %", "DPO on 40 %", "DPO on 33 %", "DPO on 25 %"),
}
_SHARES_KEPT = ("100 %", "50 %", "40 %", "33 %", "25 %")


@dataclass(frozen=True)
class Measured:
    """Every method's models of all seeds, trained and decoded with."""

    accuracy: dict[str, list[dict[str, float]]]
    """Method → for each seed, share of the longer response → accuracy against gold order."""
    betas: dict[str, float | None]
    """Method → strength of guidance; None for a policy, which decodes alone."""
    answers: dict[str, list[Answers]]
    """Method, or the base → each seed's answers."""

    def accuracies(self, name: str) -> dict[float, Estimate]:
        """Over seeds, by share."""
        return {share: estimate([found[f"{share:g}"] for found in self.accuracy[name]]) for share in SHARES}


def find(measured: Measured) -> dict[str, Finding]:
    """Name of the files → finding."""
    return {"objectives": _objectives(measured), "truncation": _truncation(measured)}


def _objectives(measured: Measured) -> Finding:
    names = [BASE.name, *METHODS]
    accuracies = [measured.accuracies(name) for name in METHODS]
    betas = [measured.betas[name] for name in METHODS]
    table = {
        "trained by": names,
        **{f"accuracy at {share:.0%}": ["", *(f"{own[share]:.3f}" for own in accuracies)] for share in SHARES},
        "β": ["", *("" if beta is None else f"{beta:g}" for beta in betas)],
        **{
            heading: [f"{over_seeds(measured.answers, name, measure):.2f}" for name in names]
            for heading, measure in (("gold reward", "gold"), ("judge", "judge"), ("KL, nats", "kl"))
        },
    }
    pairs = [("partial, causal", "full"), ("partial, causal", f"full{_ENDED}"), ("vocabulary", "partial, causal")]
    pairs += [("distilled", "vocabulary"), ("full", "full, TRL"), ("DPO", "DPO, TRL")]
    return Finding(
        "Objectives: what reward models and policies know, and what they are worth",
        (table,),
        tuple(_gap(measured, better, than) for better, than in pairs),
        f"{of_sweep(measured.answers)} Accuracy against gold order on the demo's test pairs, both responses cut at a "
        "share of the longer; of policies that of their implicit reward. Reward models guide over the base's 10 "
        "likeliest tokens, β by gold on other prompts with seed 0; policies decode alone.",
        {"betas": measured.betas, "accuracy": measured.accuracy, "settings": dump_sweep(measured.answers, names)},
        lambda figure: _draw(figure, measured),
        (12.0, 0.36 * len(names) + 2.0),
    )


def _gap(measured: Measured, better: str, than: str) -> str:
    found = gap(measured.answers, better, than, "gold")
    words = say(found.verdict, "better than", "worse than", "not clearly different from")
    return f"Answers by “{better}” are {words} those by “{than}” (gold {found:+.2f} over the seeds)."


def _truncation(measured: Measured) -> Finding:
    whole = {name: measured.accuracies(name)[1.0] for names in TRUNCATED.values() for name in names}
    golds = {name: over_seeds(measured.answers, name, "gold") for name in whole}
    table = {"trained on the first": list(_SHARES_KEPT)}
    for heading, values, form in (("accuracy on whole responses", whole, ".3f"), ("gold reward", golds, ".2f")):
        table |= {f"{kind}: {heading}": [format(values[n], form) for n in names] for kind, names in TRUNCATED.items()}
    return Finding(
        "Training on the beginnings of responses",
        (table,),
        tuple(_gap(measured, names[1], names[0]) for names in TRUNCATED.values()),
        of_sweep(measured.answers),
        {"accuracy": {n: e.dump() for n, e in whole.items()}, "gold": {n: e.dump() for n, e in golds.items()}},
        lambda figure: _draw_truncation(figure, whole, golds),
    )


def _draw(figure: Any, measured: Measured) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(METHODS)
    places = list(range(len(names)))
    for share, colour in zip((0.25, 0.5, 1.0), (GREY, ORANGE, BLUE), strict=True):
        found = [measured.accuracies(name)[share] for name in names]
        means, errors = [e.mean for e in found], [e.standard_error for e in found]
        left.errorbar(means, places, xerr=errors, fmt="o", color=colour, capsize=2, label=f"first {share:.0%}")
    left.set_xlabel("accuracy against gold order")
    left.set_yticks(places, names)
    left.invert_yaxis()
    left.legend(fontsize=8)
    golds = [over_seeds(measured.answers, name, "gold") for name in names]
    right.barh(places, [e.mean for e in golds], xerr=[e.standard_error for e in golds], color=BLUE, capsize=2)
    right.axvline(over_seeds(measured.answers, BASE.name, "gold").mean, color=GREY, linestyle=":", label="base")
    right.set_xlabel("gold reward of answers")
    right.legend(fontsize=8)


def _draw_truncation(figure: Any, whole: dict[str, Estimate], golds: dict[str, Estimate]) -> None:
    axes = figure.subplots(1, 2)
    for axis, values, title in zip(axes, (whole, golds), ("accuracy on whole responses", "gold reward"), strict=True):
        for (kind, names), colour in zip(TRUNCATED.items(), (BLUE, ORANGE), strict=True):
            _line(axis, [values[name] for name in names], colour, kind)
        axis.set(xlabel="trained on the first part of each response", title=title)
        axis.legend(fontsize=8)


def _line(axis: Any, values: Sequence[Estimate], colour: str, label: str) -> None:
    means, errors = [v.mean for v in values], [v.standard_error for v in values]
    axis.errorbar(_SHARES_KEPT, means, errors, fmt="o-", color=colour, capsize=2, label=label)
