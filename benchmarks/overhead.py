"""`steersman bench`: what a guided token costs beside a plain one, interleaved in one run, and where the time goes."""

import argparse
import asyncio
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from steersman.benchmarks.closed_loop import Load, Measurement, run_load
from steersman.benchmarks.common.demo import demo_server, read_prompts
from steersman.benchmarks.common.results import RESULTS, write_json
from steersman.benchmarks.naive import measure_naive
from steersman.demo import MODELS, REWARD_MODELS

GUIDANCE: dict[str, Any] = {"method": "pargs", "reward_model": "helpful", "beta": 1.5, "top_k": 10}
HEADS = tuple(f"head-{n}" for n in range(1, 9))
"""Names under which the demo's head is loaded beside itself: each computes for itself."""
METHODS: dict[str, dict[str, Any]] = {
    "pargs": GUIDANCE,
    "pargs, head": {**GUIDANCE, "reward_model": "instant", "beta": 3.0},
    "pargs, eight heads": {
        **{"method": "pargs", "beta": 3.0, "top_k": 10},
        "rewards": [{"model": name, "weight": 1 / 8} for name in HEADS],
    },
    "pargs, head over a policy head": {
        **{**GUIDANCE, "reward_model": "instant", "beta": 3.0},
        "policies": {"base": 0.5, "dpo-head": 0.5},
    },
    "mixed, policy head": {"method": "mixed", "policy": "dpo-head", "mix": 0.5},
    "pargs, vocabulary head": {**GUIDANCE, "reward_model": "swift"},
    "pargs, first 16 tokens": {**GUIDANCE, "gate": {"first_tokens": 16}},
    "mixed": {"method": "mixed", "policy": "dpo", "mix": 0.7},
    "length_control, 16 tokens": {"method": "length_control", "policy": "dpo", "length": 16},
    "kl_threshold, exact": {"method": "kl_threshold", "policy": "dpo", "threshold": 0.5},
    "kl_threshold, 1000 samples": {
        **{"method": "kl_threshold", "policy": "dpo", "threshold": 0.5},
        **{"estimator": "monte_carlo", "samples": 1000},
    },
    "product of base and policy": {"method": "product", "policies": {"base": 0.5, "dpo": 1.0}},
    "pargs over a mixed policy": {**GUIDANCE, "policies": {"base": 0.5, "dpo": 0.5}},
}
CONCURRENCY = (1, 8, 32)
LENGTHS = (32, 128, 512)
_TOKENS = 128


def main(argv: Sequence[str]) -> int:
    """Measures, prints tables, and writes JSON and a plot."""
    parser = argparse.ArgumentParser(prog="steersman bench", description=__doc__)
    named = f"with its head under the names {HEADS[0]} to {HEADS[-1]} too"
    parser.add_argument("--url", help=f"Address of a running demo server, {named}; without it one is started.")
    parser.add_argument("--rounds", type=int, default=5, help="Rounds of plain and guided traffic in turn.")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="NAME",
        help=f"Only these and pargs, in more rounds: {', '.join(METHODS)}.",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead-cpu.json")
    args = parser.parse_args(list(argv))
    torch.set_num_threads(1)
    console = Console()
    prompts = read_prompts("reporting")
    methods = {name: METHODS[name] for name in METHODS if name in ("pargs", *args.methods)}
    copies = [flag for name in HEADS for flag in ("--reward-model", f"{name}={MODELS / REWARD_MODELS['instant']}")]
    with demo_server(args.url, flags=copies) as url:
        asyncio.run(run_load(url, prompts, GUIDANCE, Load(8, requests=8, max_tokens=32)))
        levels = [measure_level(url, prompts, methods, c, args.rounds, console) for c in CONCURRENCY]
        neighbours = [measure_neighbours(url, prompts, c, args.rounds, console) for c in CONCURRENCY[1:]]
        work = [measure_work(url, prompts, length) for length in LENGTHS]
    naive = measure_naive(prompts[:2], GUIDANCE, _TOKENS)
    for level in levels:
        level["over_naive"] = level["guided"]["tokens_per_second"] / naive
    result = {
        "levels": levels,
        "neighbours": neighbours,
        "work": work,
        "naive_tokens_per_second": naive,
        "guidance": GUIDANCE,
    }
    write_json(args.out, result)
    print_tables(result, console)
    plot(result, args.out.with_suffix(".png"))
    console.print(f"written: {args.out} and {args.out.with_suffix('.png')}")
    return 0


def measure_level(
    url: str,
    prompts: list[str],
    methods: Mapping[str, dict[str, Any]],
    concurrency: int,
    rounds: int,
    console: Console,
) -> dict[str, Any]:
    """Plain and every method in turn, so that a slow spell of the machine falls on all of them; plain before every
    other method, for it is what all are compared with."""
    arms: dict[str, list[Measurement]] = {name: [] for name in ("plain", *methods)}
    names = list(methods)
    order = [name for n in range(0, len(names), 2) for name in ("plain", *names[n : n + 2])]
    streams: dict[str, list[Measurement]] = {"plain": [], "pargs": []}
    stages: list[dict[str, float]] = []
    load = Load(concurrency, requests=max(2, 2 * concurrency), max_tokens=_TOKENS)
    for _ in track(range(rounds), f"concurrency {concurrency}", console=console):
        for name in order:
            guidance, before = methods.get(name), _work(url)
            arms[name].append(asyncio.run(run_load(url, prompts, guidance, load)))
            if name == "pargs":
                after = _work(url)
                stages.append({key: after[key] - before[key] for key in after})
        for name, runs in streams.items():
            runs.append(asyncio.run(run_load(url, prompts, methods.get(name), replace(load, stream=True))))
    summary: dict[str, Any] = {
        "concurrency": concurrency,
        "plain": _summarise(arms["plain"], streams["plain"]),
        "guided": _summarise(arms["pargs"], streams["pargs"]),
        "methods": {name: _compare(arms[name], arms["plain"]) for name in methods},
    }
    summary |= {
        "throughput_ratio": summary["methods"]["pargs"]["ratio"],
        "throughput_ratios": summary["methods"]["pargs"]["ratios"],
        "gap_ratio": summary["guided"]["gap_median_ms"] / summary["plain"]["gap_median_ms"],
        "stages_ms": _stages(summary, stages, concurrency),
    }
    return summary


def measure_neighbours(url: str, prompts: list[str], concurrency: int, rounds: int, console: Console) -> dict[str, Any]:
    """Plain requests, half of the load, beside as many plain ones and beside as many that a head guides, in turn."""
    half = Load(concurrency // 2, requests=concurrency, max_tokens=_TOKENS)

    async def run(guidance: dict[str, Any] | None) -> float:
        plain, _ = await asyncio.gather(run_load(url, prompts, None, half), run_load(url, prompts, guidance, half))
        return plain.tokens_per_second

    ratios = []
    for _ in track(range(2 * rounds), f"neighbours, concurrency {concurrency}", console=console):
        beside_plain = asyncio.run(run(None))
        ratios.append(asyncio.run(run(METHODS["pargs, head"])) / beside_plain)
    return {"concurrency": concurrency, "ratio": statistics.median(ratios), "ratios": ratios}


def _compare(runs: list[Measurement], plain: list[Measurement]) -> dict[str, Any]:
    """A method beside plain decoding, round by round, and the tokens that it read for each that it generated."""
    often = len(plain) // len(runs)
    rounds = [plain[n : n + often] for n in range(0, len(plain), often)]
    ratios = [
        run.tokens_per_second / statistics.mean(other.tokens_per_second for other in beside)
        for run, beside in zip(runs, rounds, strict=True)
    ]
    reports = [report for run in runs for report in run.reports]
    generated = sum(report["tokens"] for report in reports)
    fields = ("reward_model_tokens", "policy_tokens", "saved_reward_model_tokens", "saved_policy_tokens")
    return {
        "tokens_per_second": statistics.median(run.tokens_per_second for run in runs),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        **{f"{field}_per_token": sum(report[field] for report in reports) / generated for field in fields},
    }


def measure_work(url: str, prompts: list[str], length: int) -> dict[str, Any]:
    """Reward-model tokens per generated token, counted by the runtime, for answers of `length` tokens."""
    result = asyncio.run(run_load(url, prompts[:4], GUIDANCE, Load(4, requests=4, max_tokens=length)))
    read = sum(report["reward_model_tokens"] for report in result.reports)
    return {"generated": length, "reward_model_tokens_per_token": read / result.tokens, "seconds": result.seconds}


def print_tables(result: dict[str, Any], console: Console) -> None:
    """Throughput and latency, stages of a step, work per token."""
    table = Table("concurrency", "plain tok/s", "guided tok/s", "ratio", "plain gap ms", "guided gap ms", "× naive")
    for level in result["levels"]:
        plain, guided = level["plain"], level["guided"]
        table.add_row(
            str(level["concurrency"]),
            f"{plain['tokens_per_second']:.0f}",
            f"{guided['tokens_per_second']:.0f}",
            f"{level['throughput_ratio']:.2f}",
            f"{plain['gap_median_ms']:.1f}",
            f"{guided['gap_median_ms']:.1f}",
            f"{level['over_naive']:.0f}",
        )
    console.print(table)
    methods = Table(
        "method", *(f"at {level['concurrency']}" for level in result["levels"]), title="of plain throughput"
    )
    for name in result["levels"][0]["methods"]:
        methods.add_row(name, *(f"{level['methods'][name]['ratio']:.2f}" for level in result["levels"]))
    console.print(methods)
    beside = Table("concurrency", "of plain throughput beside plain requests", title="plain requests beside a head's")
    for row in result["neighbours"]:
        beside.add_row(str(row["concurrency"]), f"{row['ratio']:.2f}")
    console.print(beside)
    stages = Table("concurrency", *(name for name in result["levels"][0]["stages_ms"]), title="ms of a guided step")
    for level in result["levels"]:
        stages.add_row(str(level["concurrency"]), *(f"{value:.2f}" for value in level["stages_ms"].values()))
    console.print(stages)
    work = Table("generated tokens", "reward-model tokens per generated token")
    for row in result["work"]:
        work.add_row(str(row["generated"]), f"{row['reward_model_tokens_per_token']:.2f}")
    console.print(work)
    console.print(f"naive reference: {result['naive_tokens_per_second']:.1f} tokens/s at {_TOKENS} tokens")


def plot(result: dict[str, Any], path: Path) -> None:
    """Ratio over concurrency, and what a guided step is made of."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), width_ratios=(1.8, 1))
    labels = [str(level["concurrency"]) for level in result["levels"]]
    names, height = list(result["levels"][0]["methods"]), 0.8 / len(labels)
    for n, (level, colour) in enumerate(zip(result["levels"], ("#8ecae6", "#2a6f97", "#023047"), strict=False)):
        places = [m + n * height for m in range(len(names))]
        ratios = [level["methods"][name]["ratio"] for name in names]
        left.barh(places, ratios, height, color=colour, label=f"{level['concurrency']} requests at once")
        for place, name in zip(places, names, strict=True):
            rounds = level["methods"][name]["ratios"]
            left.plot(rounds, [place] * len(rounds), "k.", markersize=2)
    left.set_yticks([m + height for m in range(len(names))], names)
    left.invert_yaxis()
    left.axvline(1, color="grey", linewidth=0.8)
    left.set(xlabel="throughput over plain vLLM's (dots: rounds)", xlim=(0, 1.15))
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    left.set_title("Methods beside plain decoding")
    bottom = [0.0] * len(labels)
    for name, colour in zip(
        result["levels"][0]["stages_ms"], ("#adb5bd", "#f4a261", "#e76f51", "#2a9d8f", "#6c757d"), strict=False
    ):
        values = [level["stages_ms"][name] for level in result["levels"]]
        right.bar(labels, values, bottom=bottom, label=name, color=colour)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    right.set(xlabel="concurrent requests", ylabel="ms")
    right.set_title("A step of pargs")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _summarise(runs: list[Measurement], streams: list[Measurement]) -> dict[str, float]:
    gaps = sorted(gap for run in streams for gap in run.gaps)
    return {
        "tokens_per_second": statistics.median(run.tokens_per_second for run in runs),
        "gap_median_ms": 1e3 * statistics.median(gaps),
        "gap_p95_ms": 1e3 * gaps[int(0.95 * len(gaps))],
    }


def _stages(summary: dict[str, Any], stages: list[dict[str, float]], concurrency: int) -> dict[str, float]:
    """Milliseconds of a guided step: plain decoding, our stages, and what neither accounts for."""
    steps = sum(stage["steps"] for stage in stages)
    plain = 1e3 * concurrency / summary["plain"]["tokens_per_second"]
    guided = 1e3 * concurrency / summary["guided"]["tokens_per_second"]
    ours = {
        "candidates": 1e3 * sum(stage["candidates_seconds"] for stage in stages) / steps,
        "reward model": 1e3 * sum(stage["rewards_seconds"] for stage in stages) / steps,
        "combine and write": 1e3 * sum(stage["writing_seconds"] for stage in stages) / steps,
    }
    return {"plain step": plain, **ours, "rest": max(0.0, guided - plain - sum(ours.values()))}


def _work(url: str) -> dict[str, float]:
    work = httpx.get(f"{url}/v1/guidance", timeout=60).json()["work"]
    return {name: value for name, value in work.items() if name.endswith("_seconds") or name == "steps"}
