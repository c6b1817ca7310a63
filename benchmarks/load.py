"""`steersman bench load`: plain, guided and mixed traffic at rising rates: latency, goodput, what answers are worth."""

import argparse
import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from steersman.benchmarks.common.demo import demo_server, read_prompts
from steersman.benchmarks.common.results import RESULTS
from steersman.benchmarks.load_tables import Line, Objective, find, summarise
from steersman.benchmarks.load_traffic import PLAIN, Arm, Measured, Traffic, send
from steersman.benchmarks.quality import progress_bar

PARGS: dict[str, Any] = {"method": "pargs", "reward_model": "helpful", "beta": 4, "top_k": 10}
METHODS: dict[str, dict[str, Any]] = {
    "pargs": PARGS,
    "args": {**PARGS, "method": "args", "reward_model": "full", "beta": 2},
    "mixed": {"method": "mixed", "policy": "dpo", "mix": 0.7},
    "length_control": {"method": "length_control", "policy": "dpo", "length": 16},
    "kl_threshold": {"method": "kl_threshold", "policy": "dpo", "threshold": 0.5},
    "product": {"method": "product", "policies": {"base": 0.5, "dpo": 1.0}},
    "best_of_n": {"method": "best_of_n", "reward_model": "helpful", "n": 4},
    "blockwise": {"method": "blockwise", "reward_model": "helpful", "n": 4, "block": 16},
}
"""One setting for each method; the server counts KL by method."""
MIXED = "half and half"
_JUDGED = 48
"""Answers of each kind that are scored."""


def main(argv: Sequence[str]) -> int:
    """Writes RESULTS/load.json, .md and .png."""
    parser = argparse.ArgumentParser(prog="steersman bench load", description=__doc__)
    parser.add_argument("--url", help="Address of a running server with the demo's names; without it one is started.")
    parser.add_argument("--rates", type=float, nargs="+", default=[4.0, 8.0, 16.0], help="Requests a second.")
    parser.add_argument("--saturate", action="store_true", help="At the end, as many requests as may be at once.")
    parser.add_argument("--seconds", type=float, default=15.0, help="For which requests of one arm arrive.")
    parser.add_argument("--max-tokens", type=int, default=120)
    parser.add_argument("--concurrency", type=int, default=64, help="The most requests at once.")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--goodput", type=float, nargs=2, default=[500.0, 50.0], metavar=("TTFT_MS", "TPOT_MS"))
    parser.add_argument("--judge", default="judge", help="The reward model that says what answers are worth.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(list(argv))
    objective = Objective(args.goodput[0] / 1e3, args.goodput[1] / 1e3)
    with demo_server(args.url, 8036) as url:
        traffic = Traffic(url, "demo", read_prompts("reporting"), args.max_tokens, args.seconds, args.concurrency)
        rates = [*sorted(args.rates), *([math.inf] if args.saturate else [])]
        lines = asyncio.run(_measure(traffic, arms(args.methods), rates, args.judge, objective))
    find(lines, MIXED, objective).write(args.out / "load", Console())
    return 0


def arms(methods: Sequence[str]) -> list[Arm]:
    """Plain traffic, each method's, and plain requests between those of all methods."""
    chosen = {name: METHODS[name] for name in methods}
    mixed = tuple(kind for name, guidance in chosen.items() for kind in ((PLAIN, None), (name, guidance)))
    own = [Arm(name, ((name, guidance),)) for name, guidance in chosen.items()]
    return [Arm(PLAIN, ((PLAIN, None),)), *own, Arm(MIXED, mixed)]


async def _measure(
    traffic: Traffic, kinds: Sequence[Arm], rates: Sequence[float], judge: str, objective: Objective
) -> list[Line]:
    plain = kinds[0]
    lines = []
    with progress_bar() as progress:
        for rate in rates:
            # The second half of plain traffic at the end: a slow spell of the machine falls on it too.
            order = [*kinds, plain]
            measured: dict[str, Measured] = {}
            shown = f"{rate:g} requests a second" if math.isfinite(rate) else "saturation"
            for arm in progress.track(order, description=shown):
                found = await send(traffic, arm, rate)
                if arm.name in measured:
                    found.sent += measured[arm.name].sent
                    found.seconds += measured[arm.name].seconds
                measured[arm.name] = found
            for found in measured.values():
                lines += summarise(found, await _judge(traffic.url, judge, found), objective)
    return lines


async def _judge(url: str, judge: str, measured: Measured) -> dict[str, list[float]]:
    """Kind → rewards of some of its answers."""
    rewards: dict[str, list[float]] = {}
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        for sent in measured.sent:
            own = rewards.setdefault(sent.kind, [])
            if sent.text and len(own) < _JUDGED:
                body = {"model": judge, "prompt": sent.prompt, "responses": [sent.text]}
                reply = (await client.post("/v1/rewards", json=body)).raise_for_status().json()
                own.append(reply["data"][0]["reward"])
    return rewards
