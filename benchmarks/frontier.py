"""Reward against the KL from the base, of a preference-tuned policy mixed in; and where in an answer the KL lies.

Shallow Preference Signals, §3.3 and §4: length control and KL threshold are said to lie above the mixing curve.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from steersman.benchmarks.common.rendering import BLUE, GREEN, GREY, ORANGE, RED, VIOLET
from steersman.benchmarks.settings import Setting
from steersman.benchmarks.statistics import Estimate, estimate, height_over_curve
from steersman.benchmarks.steering import first_tokens, pargs
from steersman.benchmarks.sweep import (
    BASE,
    STRENGTH,
    Curve,
    Finding,
    Sweep,
    dump_sweep,
    of_sweep,
    over_seeds,
    per_seed,
    say,
)

MIXING = Curve(
    "mixing", "a", (0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5), lambda p, a: {"method": "mixed", "policy": p, "mix": a}
)
LENGTH = Curve(
    "length control",
    "t",
    (1, 2, 4, 8, 16, 32),
    lambda p, t: {"method": "length_control", "policy": p, "length": int(t)},
)
THRESHOLD = Curve(
    "KL threshold",
    "b",
    (0.05, 0.1, 0.2, 0.5, 1.0, 2.0),
    lambda p, b: {"method": "kl_threshold", "policy": p, "threshold": b},
)
GATED = first_tokens(STRENGTH)
SEARCH = Curve("best of n", "n", (4, 16), lambda _, n: {"method": "best_of_n", "reward_model": "helpful", "n": int(n)})
POLICY = MIXING.at(1.0)
"""The policy alone."""
WHOLE = f"PARGS β = {STRENGTH:g}"
"""Ungated PARGS."""

_BANDS = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64))


def frontier_settings(policy: str) -> list[Setting]:
    """What the frontier is drawn from."""
    mixing = [s.steered(trace=True) if s.name == POLICY else s for s in MIXING.settings(policy)]
    length, threshold, search, gated = (curve.settings(policy) for curve in (LENGTH, THRESHOLD, SEARCH, GATED))
    # The first to use a reward model reads the prompts, which are cached for the rest: not one of the gated, whose work
    # is small.
    return [BASE, *mixing, *length, *threshold, *search, Setting(WHOLE, pargs(STRENGTH)), *gated]


def frontier(sweep: Sweep) -> Finding:
    """Reward against KL, and how far each other method lies over the mixing curve at the same KL."""
    names = [s.name for s in frontier_settings("")]
    heights = {
        measure: {name: height(sweep, [name], measure) for name in names if name not in (BASE.name, *MIXING.names)}
        for measure in ("gold", "judge")
    }
    table = {
        "setting": names,
        "KL, nats": [f"{over_seeds(sweep, n, 'kl'):.2f}" for n in names],
        "gold reward": [f"{over_seeds(sweep, n, 'gold'):.2f}" for n in names],
        "gold over mixing at the same KL": [_signed(heights["gold"].get(n)) for n in names],
        "judge": [f"{over_seeds(sweep, n, 'judge'):.2f}" for n in names],
        "judge over mixing": [_signed(heights["judge"].get(n)) for n in names],
        "tokens": [f"{over_seeds(sweep, n, 'tokens'):.0f}" for n in names],
    }
    means = {curve.name: height(sweep, curve.names, "gold") for curve in (LENGTH, THRESHOLD, GATED)}
    return Finding(
        "Reward against KL from the base",
        (table,),
        tuple(_judgement(name, mean) for name, mean in means.items()),
        of_sweep(sweep),
        {
            "settings": dump_sweep(sweep, names),
            "height_over_mixing": {
                measure: {name: value and value.dump() for name, value in found.items()}
                for measure, found in heights.items()
            },
            "mean_height_over_mixing": {name: value and value.dump() for name, value in means.items()},
        },
        lambda figure: _draw_frontier(figure, sweep),
        (15.0, 6.5),
    )


def height(
    sweep: Sweep, names: Sequence[str], measure: str, curve: Sequence[str] = (BASE.name, *MIXING.names)
) -> Estimate | None:
    """How far settings lie above the same seed's curve of other settings at the same KL: the mean over those that have
    a KL on the curve with every seed, estimated over seeds; None where there is none.

    The curve is drawn straight between its settings, and so a little too low where it is bent.
    """
    curves = zip(*(_points(sweep, name, measure) for name in curve), strict=True)
    rows = []
    for n, points in enumerate(curves):
        rows.append([height_over_curve(_points(sweep, name, measure)[n], points) for name in names])
    inside = [column for column in zip(*rows, strict=True) if None not in column]
    return estimate([statistics.fmean(v) for v in zip(*inside, strict=True)]) if inside else None


def positions(sweep: Sweep) -> Finding:
    """KL per position of the policy alone."""
    bands = [_band_means(sweep, first, last) for first, last in _BANDS]
    early, late = (_band_means(sweep, *band) for band in ((1, 8), (9, 64)))
    excess = estimate([a - b for a, b in zip(early, late, strict=True)])
    first, later = estimate(early), estimate(late)
    verdict = say(excess.verdict, "higher in the beginning", "lower in the beginning", "not clearly different there")
    return Finding(
        "KL of the policy from the base by position",
        (
            {
                "positions": [f"{a}" if a == b else f"{a} to {b}" for a, b in _BANDS],
                "KL, nats a token": [f"{estimate(values):.3f}" for values in bands],
            },
        ),
        (
            f"The policy's KL from the base is {first:.3f} nats a token over the first 8 tokens and {later:.3f} over "
            f"tokens 9 to 64 (difference {excess:.3f}): {verdict}.",
        ),
        of_sweep(sweep),
        {"bands": [{"first": a, "last": b, "seeds": v} for (a, b), v in zip(_BANDS, bands, strict=True)]},
        lambda figure: _draw_positions(figure, sweep),
        (9.0, 4.2),
    )


def _points(sweep: Sweep, name: str, measure: str) -> list[tuple[float, float]]:
    """(KL, reward) of a setting for each seed."""
    return list(zip(per_seed(sweep, name, "kl"), per_seed(sweep, name, measure), strict=True))


def _judgement(name: str, mean: Estimate | None) -> str:
    if mean is None:
        return f"{name}: no setting has a KL within the mixing curve's range for every seed."
    verdict = say(mean.verdict, "above the mixing curve", "below the mixing curve", "not clearly off the mixing curve")
    return (
        f"{name[0].upper()}{name[1:]}: {verdict} (gold at the same KL, mean over its settings: {mean:+.2f}; "
        "t-test over seeds at 5 %)."
    )


def _band_means(sweep: Sweep, first: int, last: int) -> list[float]:
    """For each seed, the mean KL of the tokens at these positions, counted from 1."""
    return [
        statistics.fmean(kl for row in answers for answer in row for kl in answer.token_kl[first - 1 : last])
        for answers in sweep[POLICY]
    ]


def _reached(sweep: Sweep) -> int:
    """The last position, within the bands, that a tenth of the answers of every seed reach."""
    lengths = [sorted(len(a.token_kl) for row in answers for a in row) for answers in sweep[POLICY]]
    return min(_BANDS[-1][1], *(seed[-1 - len(seed) // 10] for seed in lengths))


def _draw_frontier(figure: Any, sweep: Sweep) -> None:
    curves = (
        *((MIXING, BLUE, "o-"), (LENGTH, RED, "s--"), (THRESHOLD, GREEN, "^--"), (GATED, ORANGE, "D:")),
        (SEARCH, GREY, "x"),
    )
    for axis, measure in zip(figure.subplots(1, 2), ("gold", "judge"), strict=True):
        for curve, colour, style in curves:
            names = [BASE.name, *curve.names] if curve is MIXING else curve.names
            names = [*names, WHOLE] if curve is GATED else names
            labels = [f"{value:g}" for value in curve.values]
            labels = ["0", *labels] if curve is MIXING else [*labels, "all"] if curve is GATED else labels
            xs, ys = ([over_seeds(sweep, n, m) for n in names] for m in ("kl", measure))
            draw_curve(
                axis, (xs, ys), labels, style, colour, f"{curve.name} ({curve.symbol})", curve in (LENGTH, SEARCH)
            )
        axis.set(xlabel="accumulated KL from the base, nats an answer", ylabel=f"mean {measure} reward")
        axis.set_title("Gold reward (the truth)" if measure == "gold" else "Independent reward model")
        axis.legend(fontsize=7)


def draw_curve(
    axis: Any,
    points: tuple[Sequence[Estimate], Sequence[Estimate]],
    labels: Sequence[str],
    style: str,
    colour: str,
    name: str,
    below: bool = False,
) -> None:
    """A curve of reward over KL with standard errors. points: KL and reward of its settings; labels: written beside
    them, or below."""
    xs, ys = points
    axis.errorbar(
        [x.mean for x in xs],
        [y.mean for y in ys],
        [y.standard_error for y in ys],
        [x.standard_error for x in xs],
        style,
        color=colour,
        label=name,
        elinewidth=0.6,
        markersize=5,
        linewidth=1.2,
    )
    for x, y, label in zip(xs, ys, labels, strict=True):
        axis.annotate(
            label,
            (x.mean, y.mean),
            xytext=(4, -11 if below else 5),
            textcoords="offset points",
            fontsize=8,
            color=colour,
        )


def _draw_positions(figure: Any, sweep: Sweep) -> None:
    axis = figure.subplots()
    places = range(1, _reached(sweep) + 1)
    for n in range(len(sweep[POLICY])):
        means = [_band_means({POLICY: [sweep[POLICY][n]]}, place, place)[0] for place in places]
        axis.plot(places, means, color=BLUE, alpha=0.3, linewidth=1, label="each seed" if n == 0 else None)
    values = [estimate(_band_means(sweep, place, place)) for place in places]
    axis.plot(places, [v.mean for v in values], color=VIOLET, linewidth=2, label="mean")
    axis.set(xlabel="position in the answer, tokens", ylabel="KL(policy‖base), nats a token")
    axis.set_title("Where the policy differs from the base")
    axis.legend(fontsize=8)


def _signed(value: Estimate | None) -> str:
    return "" if value is None else f"{value:+.2f}"
