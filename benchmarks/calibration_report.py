"""What the calibration benchmark says: tables, sentences written from the numbers, and a picture."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from steersman.benchmarks.calibration_error import (
    Calibration,
    Rewards,
    average,
    compare,
    correlate,
    correlate_unfinished,
    loss_of,
)
from steersman.benchmarks.common.rendering import BLUE, GREY, ORANGE, RED
from steersman.benchmarks.enumerable import World
from steersman.benchmarks.statistics import Estimate, estimate
from steersman.benchmarks.sweep import Finding


@dataclass(frozen=True)
class Kind:
    """The models of one objective, one for each seed."""

    name: str
    world: World
    seeds: Sequence[Rewards]

    @cached_property
    def equal(self) -> list[list[Calibration]]:
        """For each seed, at each cut: prefixes cut alike."""
        return [[compare(self.world, r, cut, cut) for cut in self.world.cuts] for r in self.seeds]

    @cached_property
    def at_equal_cuts(self) -> list[Calibration]:
        """For each seed, the average over cuts."""
        return [average(seed) for seed in self.equal]

    @cached_property
    def at_unequal_cuts(self) -> list[Calibration]:
        """For each seed, the average over pairs of different cuts."""
        return self._unequal(shift=False)

    @cached_property
    def after_constants(self) -> list[Calibration]:
        """The same, after one constant for each pair of cuts was taken off."""
        return self._unequal(shift=True)

    @cached_property
    def with_right(self) -> list[list[float]]:
        """For each seed, at each cut: the correlation of unfinished prefixes' rewards with what they should be; at the
        last, of whole answers with gold."""
        right = [*(self.world.best_rewards(cut) for cut in self.world.cuts[:-1]), self.world.gold]
        return [self._correlations(rewards, right) for rewards in self.seeds]

    @cached_property
    def between_seeds(self) -> list[list[float]]:
        """The same of every two seeds' rewards with each other."""
        return [self._correlations(one, other) for one, other in itertools.combinations(self.seeds, 2)]

    def _correlations(self, one: Rewards, other: Rewards) -> list[float]:
        unfinished = [
            correlate_unfinished(self.world, cut, a, b)
            for cut, a, b in zip(self.world.cuts[:-1], one[:-1], other[:-1], strict=True)
        ]
        return [*unfinished, correlate(one[-1], other[-1], self.world.probability)]

    def _unequal(self, shift: bool) -> list[Calibration]:
        cuts = list(itertools.combinations(self.world.cuts, 2))
        return [average([compare(self.world, rewards, i, j, shift) for i, j in cuts]) for rewards in self.seeds]

    def dump(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = {"equal_cuts": [[asdict(part) for part in seed] for seed in self.equal]}
        found["unequal_cuts"] = [asdict(part) for part in self.at_unequal_cuts]
        found["unequal_cuts_after_constants"] = [asdict(part) for part in self.after_constants]
        return found | {"correlation_with_right": self.with_right, "correlation_between_seeds": self.between_seeds}


def report(partial: Kind, full: Kind, reversed_: Rewards, pairs: int) -> Finding:
    """The finding of one run. reversed_: of the first full model, trained on until its prefixes say the opposite."""
    world = partial.world
    opposite = Kind("full, reversed", world, [reversed_])
    best = Kind("best", world, [[world.best_rewards(cut) for cut in world.cuts]])
    losses = {
        "gold": loss_of(world, world.gold),
        "full": loss_of(world, full.seeds[0][-1]),
        "reversed": loss_of(world, reversed_[-1]),
    }
    return Finding(
        "Calibration of prefix rewards in a world that can be enumerated",
        (_calibration_by_cut(best, partial, full), _calibration(partial, full), _agreement(partial, full, opposite)),
        (
            _lemma_at_equal_cuts(best, partial, full),
            _lemma_at_unequal_cuts(partial),
            _theorem(partial, full),
            f"Its proof as a checkpoint: a full model trained on until its prefixes say the opposite (correlation with "
            f"the right rewards {_range(opposite.with_right[0][:-1])}) has the loss on whole answers that it had: "
            f"{losses['reversed']:.4f} against {losses['full']:.4f} (gold's own: {losses['gold']:.4f}).",
        ),
        f"{len(world.answers)} answers of 2 to {world.longest} letters; gold is a reward of whole answers only. Each "
        f"model has {pairs} labelled pairs and a start of its own seed; mean ± standard error, or least and most, over "
        f"{len(partial.seeds)} seeds. Pairs of prefixes weigh what the base gives them; ECE over 10 bins.",
        {
            "pairs": pairs,
            "cuts": list(world.cuts),
            "best_bradley_terry": [asdict(part) for part in best.equal[0]],
            **{kind.name: kind.dump() for kind in (partial, full)},
            "reversed": {"losses": losses, "correlation_with_right": opposite.with_right[0]},
        },
        lambda figure: _draw(figure, partial, full, opposite),
        (13.0, 4.4),
    )


def _calibration_by_cut(best: Kind, *kinds: Kind) -> dict[str, list[str]]:
    cuts = best.world.cuts
    table = {
        "both cut at": [*map(str, cuts[:-1]), f"{cuts[-1]} (whole)"],
        "best possible, mean abs(σ − P)": [f"{part.mean:.3f}" for part in best.equal[0]],
    }
    for kind in kinds:
        by_cut = list(zip(*kind.equal, strict=True))
        table[f"{kind.name}, mean abs(σ − P)"] = [f"{_over(parts, 'mean'):.3f}" for parts in by_cut]
        table[f"{kind.name}, ECE"] = [f"{_over(parts, 'ece'):.3f}" for parts in by_cut]
    return table


def _calibration(*kinds: Kind) -> dict[str, list[str]]:
    rows = [
        (kind.name, cuts, parts)
        for kind in kinds
        for cuts, parts in (
            ("equal", kind.at_equal_cuts),
            ("unequal", kind.at_unequal_cuts),
            ("unequal, constants taken off", kind.after_constants),
        )
    ]
    return {
        "model": [name for name, _, _ in rows],
        "cuts": [cuts for _, cuts, _ in rows],
        "ECE": [f"{_over(parts, 'ece'):.3f}" for _, _, parts in rows],
        "mean abs(σ − P)": [f"{_over(parts, 'mean'):.3f}" for _, _, parts in rows],
        "largest": [f"{_over(parts, 'largest'):.2f}" for _, _, parts in rows],
    }


def _agreement(partial: Kind, full: Kind, opposite: Kind) -> dict[str, list[str]]:
    cuts = partial.world.cuts
    table = {"unfinished prefixes of": [*(f"{cut} tokens" for cut in cuts[:-1]), "whole answers"]}
    for words, found in (
        ("partial: with what is right", partial.with_right),
        ("full: with what is right", full.with_right),
        ("full, reversed: with what is right", opposite.with_right),
        ("partial: between seeds", partial.between_seeds),
        ("full: between seeds", full.between_seeds),
    ):
        if found:
            table[words] = [_range(values) for values in zip(*found, strict=True)]
    return table


def _lemma_at_equal_cuts(best: Kind, partial: Kind, full: Kind) -> str:
    parts = [
        f"the {kind.name} model's σ is {_over(kind.at_equal_cuts, 'mean'):.3f} from P on average "
        f"(ECE {_over(kind.at_equal_cuts, 'ece'):.3f})"
        for kind in (partial, full)
    ]
    return (
        f"Lemma 2 at equal cuts: {', '.join(parts)}. An average of σ is not quite a σ of a difference: no rewards come "
        f"closer than {best.at_equal_cuts[0].mean:.3f}."
    )


def _lemma_at_unequal_cuts(partial: Kind) -> str:
    return (
        f"At unequal cuts the partial model is {_over(partial.at_unequal_cuts, 'mean'):.3f} from P, and "
        f"{_over(partial.after_constants, 'mean'):.3f} after one constant for each pair of cuts is taken off: pairs "
        "cut at one place say nothing of the constant between places; only finished answers, which stay whole, tie "
        "them together. Guidance compares candidates of one length."
    )


def _theorem(partial: Kind, full: Kind) -> str:
    def say(kind: Kind) -> str:
        between, right = kind.between_seeds or kind.with_right, kind.with_right
        return (
            f"{kind.name} models' rewards of unfinished prefixes correlate by {_range(_unfinished(between))} between "
            f"seeds and by {_range(_unfinished(right))} with what is right, of whole answers by "
            f"{_range([seed[-1] for seed in between])} and {_range([seed[-1] for seed in right])}"
        )

    return f"Theorem 1: {say(full)}; {say(partial)}."


def _unfinished(found: Sequence[Sequence[float]]) -> list[float]:
    return [value for seed in found for value in seed[:-1]]


def _over(parts: Sequence[Calibration], measure: str) -> Estimate:
    return estimate([getattr(part, measure) for part in parts])


def _range(values: Sequence[float]) -> str:
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return least if least == most else f"{least} to {most}"


def _draw(figure: Any, partial: Kind, full: Kind, opposite: Kind) -> None:
    reliability, agreement, scatter = figure.subplots(1, 3)
    for label, seeds, colour, style in (
        ("partial, equal cuts", partial.at_equal_cuts, BLUE, "o-"),
        ("partial, unequal cuts", partial.at_unequal_cuts, ORANGE, "s--"),
        ("full, equal cuts", full.at_equal_cuts, RED, "^-"),
    ):
        for n, part in enumerate(seeds):
            said, true, _ = zip(*part.bins, strict=True)
            reliability.plot(said, true, style, color=colour, markersize=4, alpha=0.7, label=None if n else label)
    reliability.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    reliability.set(xlabel="σ(reward difference)", ylabel="exact P", title="Reliability, each seed")
    cuts = partial.world.cuts[:-1]
    for kind, colour, style in ((partial, BLUE, "o-"), (full, RED, "^-"), (opposite, GREY, "x--")):
        for n, found in enumerate(kind.with_right):
            agreement.plot(cuts, found[:-1], style, color=colour, alpha=0.7, label=None if n else kind.name)
    agreement.axhline(0, color=GREY, linewidth=0.8)
    agreement.set(xlabel="tokens of the prefix", ylabel="correlation with what is right", title="Unfinished prefixes")
    place = len(cuts) // 2
    unfinished = partial.world.unfinished(cuts[place])
    for kind, colour in ((partial, BLUE), (full, RED)):
        one, other = (rewards[place][unfinished] for rewards in (*kind.seeds, *kind.seeds)[:2])
        scatter.scatter(one - np.mean(one), other - np.mean(other), s=12, color=colour, label=kind.name)
    scatter.set(xlabel="reward, first seed", ylabel="reward, second seed", title=f"Prefixes of {cuts[place]} tokens")
    for axis in (reliability, agreement, scatter):
        axis.legend(fontsize=8)
