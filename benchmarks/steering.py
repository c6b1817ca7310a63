"""PARGS gated: where reward-model work pays. PARGS by strength: whether a KL budget bounds over-optimisation."""

from typing import Any

from steersman.benchmarks.common.rendering import BLUE, GREEN, GREY, ORANGE, RED
from steersman.benchmarks.settings import Setting
from steersman.benchmarks.statistics import Estimate, estimate
from steersman.benchmarks.sweep import BASE, STRENGTH, Curve, Finding, Sweep, dump_sweep, of_sweep, over_seeds, per_seed

BUDGETS: tuple[float | None, ...] = (None, 2.0, 5.0, 10.0)
"""Nats an answer."""
_LARGEST = 32.0
_BETAS = (1.0, 2.0, 4.0, 8.0, 16.0, _LARGEST)
_BOUNDED_BETAS = (4.0, 8.0, 16.0, _LARGEST)
"""Below these a budget is hardly ever reached."""
_GATED_BETAS = (2.0, STRENGTH)
_QUARTER = 0.3
"""What still counts as about a quarter of the work."""


def pargs(beta: float) -> dict[str, Any]:
    """Guidance by the demo's partial reward model."""
    return {"method": "pargs", "reward_model": "helpful", "top_k": 10, "beta": beta}


def first_tokens(beta: float) -> Curve:
    """PARGS at the beginning of the answer, then the base."""
    return Curve(
        f"PARGS β = {beta:g}, first tokens",
        "t",
        (4, 8, 16, 32, 64),
        lambda _, t: {**pargs(beta), "gate": {"first_tokens": int(t)}},
    )


def _uncertain(beta: float) -> Curve:
    """PARGS where the base model is uncertain."""
    return Curve(
        f"PARGS β = {beta:g}, entropy above",
        "h",
        (0.25, 0.5, 0.75, 1.0, 1.5),
        lambda _, h: {**pargs(beta), "gate": {"entropy_above": h}},
    )


GATES = tuple(curve for beta in _GATED_BETAS for curve in (first_tokens(beta), _uncertain(beta)))
"""Curves of gated PARGS; each begins with the name of the ungated setting."""


def gate_settings(policy: str) -> list[Setting]:
    """PARGS gated, in full, and not at all."""
    full = [Setting(f"PARGS β = {beta:g}", pargs(beta)) for beta in _GATED_BETAS]
    return [BASE, *full, *(setting for curve in GATES for setting in curve.settings(policy))]


def gates(sweep: Sweep) -> Finding:
    """The share of ungated PARGS's gain in gold over the base that is kept against the share of its work."""
    shares = {name: (_work(sweep, name), _kept(sweep, name)) for curve in GATES for name in curve.names}
    names = [s.name for s in gate_settings("")]
    table = {
        "setting": names,
        "gold reward": [f"{over_seeds(sweep, n, 'gold'):.2f}" for n in names],
        "reward-model tokens an answer": [f"{over_seeds(sweep, n, 'auxiliary_tokens'):.0f}" for n in names],
        "share of the work": [f"{shares[n][0]:.2f}" if n in shares else "" for n in names],
        "share of the gain": [f"{shares[n][1]:.2f}" if n in shares else "" for n in names],
    }
    return Finding(
        "PARGS where it pays: gain kept against work spent",
        (table,),
        tuple(_headline(beta, shares) for beta in _GATED_BETAS),
        of_sweep(sweep),
        {
            "settings": dump_sweep(sweep, names),
            "shares": {name: {"work": w.dump(), "gain": g.dump()} for name, (w, g) in shares.items()},
        },
        lambda figure: _draw_gates(figure, shares),
    )


def budget_settings(_: str) -> list[Setting]:
    """PARGS by strength, without and with budgets."""
    return [Setting(_budgeted(beta, nats), _guidance(beta, nats)) for nats in BUDGETS for beta in _betas(nats)]


def budgets(sweep: Sweep) -> Finding:
    """Gold against strength and KL, without and with a budget."""
    names = [s.name for s in budget_settings("")]
    measures = ("kl", "gold", "judge")
    table = {
        "setting": names,
        **{
            heading: [f"{over_seeds(sweep, n, measure):.2f}" for n in names]
            for heading, measure in zip(("KL, nats", "gold reward", "judge"), measures, strict=True)
        },
    }
    gains = {nats: [_gain(sweep, beta, nats) for beta in _BOUNDED_BETAS] for nats in BUDGETS if nats is not None}
    return Finding(
        "PARGS by strength, without and with a KL budget",
        (table,),
        (_fall_in_words(sweep), *(_gain_in_words(sweep, nats) for nats in gains)),
        of_sweep(sweep),
        {
            "settings": dump_sweep(sweep, names),
            "gain_over_no_budget": [
                {"kl_budget": nats, "beta": beta, **gain.dump()}
                for nats, found in gains.items()
                for beta, gain in zip(_BOUNDED_BETAS, found, strict=True)
            ],
        },
        lambda figure: _draw_budgets(figure, sweep),
    )


def _betas(nats: float | None) -> tuple[float, ...]:
    return _BETAS if nats is None else _BOUNDED_BETAS


def _work(sweep: Sweep, name: str) -> Estimate:
    """Reward-model tokens over those of ungated PARGS."""
    spent, full = (per_seed(sweep, n, "auxiliary_tokens") for n in (name, _ungated(name)))
    return estimate([a / b for a, b in zip(spent, full, strict=True)])


def _kept(sweep: Sweep, name: str) -> Estimate:
    """Gain in gold over the base over that of ungated PARGS."""
    base = per_seed(sweep, BASE.name, "gold")
    gained, full = (
        [value - floor for value, floor in zip(per_seed(sweep, n, "gold"), base, strict=True)]
        for n in (name, _ungated(name))
    )
    return estimate([a / b for a, b in zip(gained, full, strict=True)])


def _ungated(name: str) -> str:
    return name.split(",")[0]


def _headline(beta: float, shares: dict[str, tuple[Estimate, Estimate]]) -> str:
    own = {name: both for name, both in shares.items() if _ungated(name) == f"PARGS β = {beta:g}"}
    cheap = {name: both for name, both in own.items() if both[0].mean <= _QUARTER}
    name = max(cheap or own, key=lambda n: (cheap or own)[n][1].mean)
    work, kept = own[name]
    gate = name.split(", ", 1)[1]
    return f"β = {beta:g}: {gate} keeps {kept:.2f} of the gain for {work:.2f} of the reward-model tokens."


def _budgeted(beta: float, nats: float | None) -> str:
    return f"PARGS β = {beta:g}" if nats is None else f"PARGS β = {beta:g}, budget {nats:g} nats"


def _guidance(beta: float, nats: float | None) -> dict[str, Any]:
    return pargs(beta) if nats is None else {**pargs(beta), "kl_budget": nats}


def _gain(sweep: Sweep, beta: float, nats: float) -> Estimate:
    """What a budget adds to gold at a strength."""
    bounded, free = (per_seed(sweep, _budgeted(beta, n), "gold") for n in (nats, None))
    return estimate([a - b for a, b in zip(bounded, free, strict=True)])


def _fall_in_words(sweep: Sweep) -> str:
    tuned, largest = (per_seed(sweep, _budgeted(beta, None), "gold") for beta in (STRENGTH, _LARGEST))
    fall = estimate([a - b for a, b in zip(tuned, largest, strict=True)])
    words = {1: "over-optimised", 0: "no clear fall", -1: "still rising"}[fall.verdict]
    return f"Without a budget, gold falls by {fall:.2f} from β = {STRENGTH:g} to β = {_LARGEST:g}: {words}."


def _gain_in_words(sweep: Sweep, nats: float) -> str:
    parts = []
    for beta in _BOUNDED_BETAS[1:]:
        gain = _gain(sweep, beta, nats)
        words = {1: "better", 0: "no clear difference", -1: "worse"}[gain.verdict]
        spent = over_seeds(sweep, _budgeted(beta, nats), "kl").mean
        parts.append(f"{gain:+.2f} at β = {beta:g} ({words}; KL {spent:.1f})")
    return f"A budget of {nats:g} nats changes gold by {', '.join(parts)}."


def _draw_gates(figure: Any, shares: dict[str, tuple[Estimate, Estimate]]) -> None:
    axes = figure.subplots(1, len(_GATED_BETAS), sharey=True)
    for axis, beta in zip(axes, _GATED_BETAS, strict=True):
        for curve, colour, style in ((first_tokens(beta), BLUE, "o-"), (_uncertain(beta), RED, "s--")):
            work, kept = zip(*(shares[name] for name in curve.names), strict=True)
            axis.errorbar(
                [w.mean for w in work],
                [k.mean for k in kept],
                [k.standard_error for k in kept],
                [w.standard_error for w in work],
                style,
                color=colour,
                capsize=2,
                label=f"{curve.name.split(', ')[1]} {curve.symbol}",
            )
            for value, w, k in zip(curve.values, work, kept, strict=True):
                place = (w.mean, k.mean)
                axis.annotate(
                    f"{value:g}", place, xytext=(5, -11), textcoords="offset points", fontsize=8, color=colour
                )
        axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":", label="gain in proportion to work")
        axis.plot([1], [1], "*", color="black", markersize=9, label="ungated")
        axis.set(xlabel="share of ungated reward-model tokens", title=f"PARGS, β = {beta:g}")
        axis.legend(fontsize=8, loc="lower right")
    axes[0].set_ylabel("share of ungated gain in gold")


def _draw_budgets(figure: Any, sweep: Sweep) -> None:
    over_beta, over_kl = figure.subplots(1, 2, sharey=True)
    for nats, colour in zip(BUDGETS, (GREY, RED, ORANGE, GREEN), strict=True):
        names = [_budgeted(beta, nats) for beta in _betas(nats)]
        gold, kl = ([over_seeds(sweep, n, m) for n in names] for m in ("gold", "kl"))
        heights, errors = [g.mean for g in gold], [g.standard_error for g in gold]
        label = "no budget" if nats is None else f"budget {nats:g} nats"
        over_beta.errorbar(_betas(nats), heights, errors, fmt="o-", color=colour, capsize=2, label=label)
        over_kl.errorbar([k.mean for k in kl], heights, errors, fmt="o-", color=colour, capsize=2, label=label)
        for beta, k, place in zip(_betas(nats), kl, heights, strict=True):
            over_kl.annotate(f"{beta:g}", (k.mean, place), (5, 4), textcoords="offset points", fontsize=7, color=colour)
    over_beta.set(xscale="log", xlabel="strength β", ylabel="mean gold reward")
    over_beta.set_xticks(_BETAS, [f"{beta:g}" for beta in _BETAS])
    over_kl.set(xscale="log", xlabel="accumulated KL from the base, nats an answer")
    over_beta.legend(fontsize=8)
