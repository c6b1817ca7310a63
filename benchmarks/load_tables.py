"""What load came to: the standard columns of each kind of request, and what it cost beside plain traffic."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from steersman.benchmarks.common.rendering import BLUE, GREEN, GREY, ORANGE, RED, VIOLET
from steersman.benchmarks.load_traffic import PLAIN, Measured, Sent
from steersman.benchmarks.statistics import Estimate, estimate
from steersman.benchmarks.sweep import Finding

_COLOURS = (GREY, BLUE, GREEN, ORANGE, RED, VIOLET, "#8ecae6", "#023047", "#b5838d", "#606c38", "#000000")


@dataclass(frozen=True)
class Objective:
    """What a client calls good, in seconds: the goodput is the rate of requests that keep it."""

    first_token: float
    per_token: float

    def met_by(self, sent: Sent) -> bool:
        """Whether a request was answered well enough."""
        return not sent.error and sent.first_token <= self.first_token and sent.per_token <= self.per_token


@dataclass(frozen=True)
class Line:
    """One kind of request in one arm at one rate. Times are milliseconds."""

    arm: str
    kind: str
    rate: float
    requests: int
    failed: int
    tokens_per_second: float
    goodput: float
    """Requests a second that keep the objective."""
    first_token: tuple[float, float]
    """Median and 99th percentile, here and below."""
    per_token: tuple[float, float]
    gap: tuple[float, float] | None
    """None where answers come whole."""
    whole: tuple[float, float]
    reward: Estimate | None
    kl: float | None


def summarise(measured: Measured, rewards: Mapping[str, Sequence[float]], objective: Objective) -> list[Line]:
    """A line for each kind of request. rewards: kind → the judge's rewards of its answers."""
    lines = []
    for kind in dict.fromkeys(sent.kind for sent in measured.sent):
        own = [sent for sent in measured.sent if sent.kind == kind]
        good = [sent for sent in own if not sent.error]
        if not good:
            raise RuntimeError(f"every request of {kind} failed: {own[0].error[-500:]}")
        given = rewards.get(kind, ())
        lines.append(
            Line(
                arm=measured.arm,
                kind=kind,
                rate=measured.rate,
                requests=len(own),
                failed=len(own) - len(good),
                tokens_per_second=sum(sent.tokens for sent in good) / measured.seconds,
                goodput=sum(map(objective.met_by, own)) / measured.seconds,
                first_token=_levels([sent.first_token for sent in good]),
                per_token=_levels([sent.per_token for sent in good]),
                gap=_levels(gaps) if (gaps := [gap for sent in good for gap in sent.gaps]) else None,
                whole=_levels([sent.whole for sent in good]),
                reward=estimate(given) if given else None,
                kl=0.0 if kind == PLAIN else measured.kl.get(kind),
            )
        )
    return lines


def find(lines: Sequence[Line], mixed: str, objective: Objective) -> Finding:
    """Tables and pictures of all arms. mixed: the name of the arm with plain and guided requests."""
    plain = {line.rate: line.gap[0] for line in lines if line.arm == PLAIN and line.gap}
    neighbours = [
        f"At {_rate(line.rate)}, plain requests in mixed traffic wait {line.gap[0]:.1f} ms between tokens (median), "
        f"in plain traffic {plain[line.rate]:.1f} ms: {line.gap[0] / plain[line.rate]:.2f} times."
        for line in lines
        if line.arm == mixed and line.kind == PLAIN and line.gap
    ]
    return Finding(
        "Load",
        (_table(lines, plain),),
        tuple(neighbours),
        "Open-loop Poisson arrivals by vllm.benchmarks.serve; “saturation”: as many requests as may be at once. Times "
        "in ms, median / 99th percentile. Tokens are those of `usage`: best_of_n has all n answers in it. Goodput: "
        f"requests a second with a first token within {1e3 * objective.first_token:.0f} ms and "
        f"{1e3 * objective.per_token:.0f} ms a token. Reward: the demo's judge, which steers nothing. Plain was "
        "measured before and after the other arms of its rate, in one run.",
        {"lines": [_dump(line) for line in lines]},
        lambda figure: _draw(figure, lines, mixed),
        (13.0, 4.8),
    )


def _table(lines: Sequence[Line], plain: Mapping[float, float]) -> dict[str, list[str]]:
    def pair(levels: tuple[float, float] | None) -> str:
        return f"{levels[0]:.1f} / {levels[1]:.0f}" if levels else ""

    return {
        "requests/s": [_rate(line.rate) for line in lines],
        "traffic": [line.arm for line in lines],
        "requests of": [line.kind for line in lines],
        "sent (failed)": [f"{line.requests} ({line.failed})" for line in lines],
        "tokens/s": [f"{line.tokens_per_second:.0f}" for line in lines],
        "goodput": [f"{line.goodput:.1f}" for line in lines],
        "first token": [pair(line.first_token) for line in lines],
        "per token": [pair(line.per_token) for line in lines],
        "between tokens": [pair(line.gap) for line in lines],
        "over plain": [f"{line.gap[0] / plain[line.rate]:.2f}" if line.gap else "" for line in lines],
        "whole answer": [pair(line.whole) for line in lines],
        "reward": ["" if line.reward is None else f"{line.reward:.2f}" for line in lines],
        "KL": ["" if line.kl is None else f"{line.kl:.1f}" for line in lines],
    }


def _draw(figure: Any, lines: Sequence[Line], mixed: str) -> None:
    left, middle, right = figure.subplots(1, 3)
    finite = sorted({line.rate for line in lines if math.isfinite(line.rate)})
    arms = [arm for arm in dict.fromkeys(line.arm for line in lines) if arm != mixed]
    neighbours = (line for line in lines if line.arm == mixed and line.kind == PLAIN and line.rate in finite)
    shown = [(line.rate, line.gap[0]) for line in neighbours if line.gap]
    for arm, colour in zip(arms, _COLOURS, strict=False):
        own = sorted((line for line in lines if line.arm == arm and line.rate in finite), key=lambda line: line.rate)
        gaps = [(line.rate, line.gap[0]) for line in own if line.gap]
        left.plot(*zip(*gaps, strict=True) if gaps else ((), ()), "o-", color=colour, markersize=3, label=arm)
        middle.plot(
            [line.rate for line in own], [line.whole[1] / 1e3 for line in own], "o-", color=colour, markersize=3
        )
        busiest = own[-1]
        if busiest.reward is not None:
            place = (busiest.whole[0] / 1e3, busiest.reward.mean)
            right.errorbar(*place, busiest.reward.standard_error, fmt="o", color=colour)
            right.annotate(f" {arm}", place, fontsize=7)
    if shown:
        left.plot(*zip(*shown, strict=True), "o--", color=GREY, label="plain among guided")
    left.set(xlabel="requests a second", ylabel="ms between chunks, median", title="Fluency under load")
    # Blockwise answers come block by block.
    left.set_yscale("log")
    left.legend(fontsize=7)
    middle.set(
        xlabel="requests a second", ylabel="s until the last token, 99th percentile", title="The slowest answers"
    )
    middle.set_yscale("log")
    right.set(
        xlabel="s until the last token, median",
        ylabel="judge's reward",
        title=f"Quality beside latency at {finite[-1]:g}/s",
    )
    right.margins(x=0.25)


def _levels(seconds: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(seconds)
    return 1e3 * statistics.median(ordered), 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def _rate(rate: float) -> str:
    return f"{rate:g}/s" if math.isfinite(rate) else "saturation"


def _dump(line: Line) -> dict[str, Any]:
    reward = None if line.reward is None else line.reward.dump()
    return {**asdict(line), "rate": line.rate if math.isfinite(line.rate) else None, "reward": reward}
