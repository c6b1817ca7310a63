"""What heads and their rivals come to: tables, sentences written from the numbers, and the picture of the frontier."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from steersman.benchmarks.answers import Answers, by_prompt
from steersman.benchmarks.common.rendering import BLUE, GREEN, GREY, ORANGE, RED, VIOLET
from steersman.benchmarks.frontier import draw_curve, height
from steersman.benchmarks.head_kinds import (
    BUDGETED,
    FEW,
    HEAD,
    HEAD_LONG,
    MANY,
    OTHERS,
    POLICY_HEAD,
    RIVALS,
    TOO_STRONG,
    Kind,
)
from steersman.benchmarks.statistics import Estimate, estimate
from steersman.benchmarks.sweep import BASE, Curve, Finding, dump_sweep, gap, over_seeds, say

_COLOURS = {
    "reward-head.yaml": BLUE,
    "reward-partial.yaml": ORANGE,
    "reward-vocabulary.yaml": GREEN,
    "dpo-head.yaml": VIOLET,
    "dpo.yaml": RED,
}
_GREEDY = ", greedy"
_TICKS = (0, 0.5, 1, 2, 5, 10, 20, 50)


@dataclass(frozen=True)
class Best:
    """Strengths of most gold on tuning prompts."""

    sampled: float
    greedy: float


@dataclass(frozen=True)
class Found:
    """Everything that was decoded."""

    sweep: dict[str, list[Answers]]
    """Setting's name → the answers of each seed."""
    best: dict[str, tuple[Best, ...]]
    """By the kind's name, of each of its seeds."""
    kinds: tuple[Kind, ...]

    def mean(self, name: str, measure: str) -> Estimate:
        """Over seeds; with a single one, over prompts."""
        if len(self.sweep[name]) > 1:
            return over_seeds(self.sweep, name, measure)
        return estimate(_values(self.sweep[name][0], measure))

    def common(self, names: Sequence[str]) -> int:
        """Seeds of which there are answers under every one of these settings."""
        return min(len(self.sweep[name]) for name in names)

    def of_seeds(self, count: int) -> "Found":
        """The same with the first seeds' answers alone."""
        return replace(self, sweep={name: answers[:count] for name, answers in self.sweep.items()})

    def exceeds(self, better: str, than: str, measure: str = "gold") -> Estimate:
        """By how much a setting exceeds another: over seeds, or over prompts where one has seed 0 alone."""
        ours, theirs = self.sweep[better], self.sweep[than]
        if len(ours) == len(theirs) > 1:
            return gap(self.sweep, better, than, measure)
        pairs = zip(_values(ours[0], measure), _values(theirs[0], measure), strict=True)
        return estimate([a - b for a, b in pairs])


def greedily(name: str) -> str:
    """Names a setting's greedy answers."""
    return name + _GREEDY


def _values(answers: Answers, measure: str) -> list[float]:
    values = by_prompt(answers, measure)
    assert values is not None, measure
    return values


def find(found: Found) -> Finding:
    """The finding that is written."""
    shown = [kind for kind in found.kinds if kind not in OTHERS]
    others = [kind for kind in found.kinds if kind in OTHERS]
    budgeted = [kind for kind in BUDGETED if kind in found.kinds]
    rivals = [(head, rival) for head, rival in RIVALS if head in found.kinds and rival in found.kinds]
    prompts = len(found.sweep[BASE.name][0])
    sentences = [_compare(found, *pair) for pair in rivals]
    sentences += [sentence for pair in rivals if (sentence := _over_curve(found, *pair))]
    sentences += [_over_optimised(found, kind) for kind in budgeted]
    sentences += [_other(found, kind) for kind in others]
    tables = [_kinds(found, shown)] if shown else []
    tables += [_budgets(found, budgeted)] if budgeted else []
    tables += [_kinds(found, others)] if others else []
    tables += [_strengths(found, shown)] if shown else []
    return Finding(
        "Heads on the base's own hidden state, and what they compete with",
        tuple(tables),
        tuple(sentences),
        f"Answers to {prompts} prompts that nothing was tuned on, at temperature 1 but where they are greedy. Mean ± "
        "standard error: over seeds where there are several, each with pairs and models of its own and all with the "
        "same prompts; over prompts where there is one. Kinds without a number of pairs in their names have "
        f"{FEW:,} of each seed. With seed 0 the candidate and vocabulary models of 10,000 pairs and the policies of "
        "6,000 are those that ship with the demo. Strengths (β over the base's 10 likeliest tokens, a policy's mix) "
        "are those of most gold on other prompts, of each seed's model, one for sampling, one for greedy decoding. "
        "KL: Σ log π − log π₀ of a sampled answer's tokens, what keeping 10 candidates costs included, as the server "
        "reports it. Own reward: what the guiding reward model itself gives to the whole answer.",
        {
            "best": {name: [asdict(own) for own in best] for name, best in found.best.items()},
            "settings": dump_sweep(found.sweep, [n for n in found.sweep if not n.endswith(_GREEDY)], ("gold", "kl")),
            "greedy": dump_sweep(found.sweep, [n for n in found.sweep if n.endswith(_GREEDY)], ("gold",)),
        },
        lambda figure: _draw(figure, found),
        (16.0, 7.0),
    )


def _kinds(found: Found, kinds: Sequence[Kind]) -> dict[str, list[str]]:
    """A row for each kind at its best strengths."""
    rows = [["base", "", "", "", f"{found.mean(BASE.name, 'gold'):.2f}", "0", "", ""]]
    for kind in kinds:
        best, likeliest = found.best[kind.name], greedily(kind.tuned)
        strengths, greedy_strengths = (
            ", ".join(f"{value:g}" for value in values)
            for values in ([own.sampled for own in best], [own.greedy for own in best])
        )
        gold, kl = (f"{found.mean(kind.tuned, measure):.2f}" for measure in ("gold", "kl"))
        greedy_gold = f"{found.mean(likeliest, 'gold'):.2f}"
        rows.append(
            [kind.name, f"{kind.read:,}", str(len(kind.seeds)), strengths, gold, kl, greedy_strengths, greedy_gold]
        )
    headings = ("what guides", "pairs", "seeds", "strengths", "gold, sampled", "KL, nats", "strengths, greedy")
    return dict(zip((*headings, "gold, greedy"), map(list, zip(*rows, strict=True)), strict=True))


def _settings(table: dict[str, list[str]], found: Found, names: Sequence[str]) -> dict[str, list[str]]:
    for heading, measure in (("gold, sampled", "gold"), ("KL, nats", "kl"), ("own reward", "reward")):
        table[heading] = [f"{found.mean(n, measure):.2f}" if _has(found, n, measure) else "" for n in names]
    return table


def _has(found: Found, name: str, measure: str) -> bool:
    return all(by_prompt(answers, measure) is not None for answers in found.sweep[name])


def _budgets(found: Found, kinds: Sequence[Kind]) -> dict[str, list[str]]:
    """A row for each budget, beside none."""
    names = [name for kind in kinds for name in (kind.curve.at(TOO_STRONG), *kind.budgets.names)]
    return _settings({"with a budget, nats": names}, found, names)


def _strengths(found: Found, kinds: Sequence[Kind]) -> dict[str, list[str]]:
    """A row for each strength of each kind."""
    names = [name for kind in kinds for name in kind.curve.names]
    return _settings({"every strength": names}, found, names)


def _compare(found: Found, head: Kind, rival: Kind) -> str:
    """In words, sampled and greedy."""
    ways = {
        "sampled": (head.tuned, rival.tuned),
        "greedy": (greedily(head.tuned), greedily(rival.tuned)),
    }
    count = found.common([name for names in ways.values() for name in names])
    own = found.of_seeds(count)
    parts = []
    for way, (ours, theirs) in ways.items():
        difference = own.exceeds(ours, theirs)
        word = say(difference.verdict, "better", "worse", "not clearly different")
        golds = f"gold {own.mean(ours, 'gold'):.2f} against {own.mean(theirs, 'gold'):.2f}"
        parts.append(f"{way} it is {word} ({golds}; difference {difference:+.2f})")
    over = "over seeds" if count > 1 else "with seed 0, over prompts"
    pairs = f", {head.read:,} pairs" if head.pairs == FEW else ""
    return f"{_named(head)} against {rival.name}{pairs}, differences {over}: {'; '.join(parts)}."


def _over_curve(found: Found, head: Kind, rival: Kind) -> str | None:
    """In words, at the same KL; None without a common range of KL."""
    curve = (BASE.name, *rival.curve.names)
    count = found.common((*head.curve.names, *curve))
    mean = height(found.of_seeds(count).sweep, head.curve.names, "gold", curve)
    if mean is None:
        return None
    word, seeds = "above" if mean.mean > 0 else "below", "seed 0 alone"
    if count > 1:
        word, seeds = say(mean.verdict, "above", "below", "not clearly off"), "over seeds"
    return f"At the same KL, {head.name} lies {word} the curve of {rival.name} (gold {mean:+.2f}, {seeds})."


def _over_optimised(found: Found, kind: Kind) -> str:
    """In words: what too large a β does, and budgets at it."""
    best, strong = kind.tuned, kind.curve.at(TOO_STRONG)
    own = found.of_seeds(found.common((best, strong, *kind.budgets.names)))

    def at(name: str) -> str:
        gold, reward, kl = (own.mean(name, measure) for measure in ("gold", "reward", "kl"))
        return f"gold {gold:.2f}, own reward {reward:.3f}, KL {kl:.1f}"

    budgets = ", ".join(
        f"{value:g} nats {own.mean(name, 'gold'):.2f}"
        for value, name in zip(kind.budgets.values, kind.budgets.names, strict=True)
    )
    curve = (BASE.name, *kind.curve.names)
    off = height(found.of_seeds(found.common((*curve, *kind.budgets.names))).sweep, kind.budgets.names, "gold", curve)
    beside = "" if off is None else f"; at the same KL that is {off:+.2f} off the curve of smaller β without a budget"
    return (
        f"{_named(kind)} at its tuned β: {at(best)}; at β = {TOO_STRONG:g}: {at(strong)}. "
        f"Gold at β = {TOO_STRONG:g} with a kl_budget: {budgets}{beside}."
    )


def _other(found: Found, kind: Kind) -> str:
    """In words, beside the recipe's own target or loss with the same seed."""
    usual = HEAD if kind.is_reward else POLICY_HEAD
    if usual.name not in found.best:
        return f"{_named(kind)}: gold {found.mean(kind.tuned, 'gold'):.2f} sampled."
    parts = []
    for way, name, other in (
        ("sampled", kind.tuned, usual.tuned),
        ("greedy", greedily(kind.tuned), greedily(usual.tuned)),
    ):
        difference = found.exceeds(name, other)
        parts.append(
            f"{way} {say(difference.verdict, 'better than', 'worse than', 'not clearly different from')} the "
            f"{usual.name} of the recipe (gold {difference:+.2f})"
        )
    return f"{_named(kind)}, seed 0, over prompts: {'; '.join(parts)}."


def _named(kind: Kind) -> str:
    return kind.name[0].upper() + kind.name[1:]


def _draw(figure: Any, found: Found) -> None:
    shown = [kind for kind in found.kinds if kind not in OTHERS]
    panels = [panel for pairs in (FEW, MANY) if (panel := [kind for kind in shown if kind.pairs == pairs])]
    axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
    for axis, kinds in zip(axes, panels, strict=False):
        for kind in kinds:
            colour = _COLOURS[kind.config] if kind is not HEAD_LONG else GREY
            _draw_one(axis, found, kind.curve, colour, "o-" if kind.is_head else "s--", (BASE.name,))
            if kind in BUDGETED:
                _draw_one(axis, found, kind.budgets, colour, "D:")
        axis.set(xscale="symlog", xlabel="KL from the base, nats a sampled answer", ylabel="mean gold, sampled")
        axis.set_xticks(_TICKS, [f"{nats:g}" for nats in _TICKS])
        axis.set_title(f"{kinds[0].read:,} pairs" if kinds[0].pairs == FEW else "10,000 pairs, policies 6,000")
        axis.legend(fontsize=8)


def _draw_one(axis: Any, found: Found, curve: Curve, colour: str, style: str, first: tuple[str, ...] = ()) -> None:
    names = [*first, *curve.names]
    labels = [*("0" for _ in first), *(f"{value:g}" for value in curve.values)]
    # Points of one curve are of the same seeds.
    own = found.of_seeds(found.common(names))
    xs, ys = ([own.mean(name, measure) for name in names] for measure in ("kl", "gold"))
    draw_curve(axis, (xs, ys), labels, style, colour, f"{curve.name} ({curve.symbol})", below=bool(not first))
