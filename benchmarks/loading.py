"""What streams feel of a model that is loaded and unloaded beside them.

Clients stream without a break, half of their answers guided. In turn a model is loaded, it is unloaded, and a while
passes in which nothing happens; the gaps between the chunks of each stream are told apart by what happened meanwhile.
"""

import argparse
import asyncio
import itertools
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import track

from steersman.benchmarks.common.demo import demo_server, read_prompts
from steersman.benchmarks.common.rendering import markdown, terminal
from steersman.benchmarks.common.results import RESULTS, write_json
from steersman.demo import MODELS

GUIDANCE: dict[str, Any] = {"method": "pargs", "reward_model": "helpful", "beta": 2.0, "top_k": 10}
LOADED = {
    "reward model, 0.17 M": {"kind": "reward_model", "path": "reward-partial"},
    "policy, 1.4 M": {"kind": "policy", "path": "dpo"},
}
PHASES = ("nothing", "loading", "unloading")
_KEY = "benchmark"
_NAME = "later"
_TOKENS = 256


@dataclass
class Traffic:
    """Streams that never end, and when their chunks came."""

    chunks: list[tuple[float, float]] = field(default_factory=list)
    """When a chunk came, and when the one before it in the same stream: `time.perf_counter` seconds."""
    failures: list[str] = field(default_factory=list)
    requests: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table, and writes JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="python -m steersman.benchmarks.loading", description=__doc__)
    parser.add_argument("--url", help="Address of a running demo server; without it one is started.")
    parser.add_argument("--port", type=int, default=8031, help="Of the server that is started.")
    parser.add_argument("--concurrency", type=int, default=8, help="Streams at once.")
    parser.add_argument("--rounds", type=int, default=10, help="How often each model is loaded.")
    parser.add_argument("--out", type=Path, default=RESULTS / "loading.json")
    args = parser.parse_args(argv)
    console = Console()
    with demo_server(args.url, args.port, ("--admin-api-key", _KEY, "--admin-model-root", str(MODELS))) as url:
        busy = [os.getloadavg()[0]]
        results = asyncio.run(measure(url, args.concurrency, args.rounds, console))
        busy.append(os.getloadavg()[0])
    write_json(args.out, {"concurrency": args.concurrency, "rounds": args.rounds, "load_average": busy, **results})
    table = tabulate(results["models"])
    note = describe(results, args.concurrency, args.rounds, busy)
    args.out.with_suffix(".md").write_text(f"{markdown(table)}\n{note}\n")
    console.print(terminal(table))
    console.print(note)
    return 0 if not results["failures"] else 1


async def measure(url: str, concurrency: int, rounds: int, console: Console) -> dict[str, Any]:
    """Every model `rounds` times, all in one spell of traffic."""
    traffic, prompts = Traffic(), itertools.cycle(read_prompts("reporting"))
    options: dict[str, Any] = {
        "timeout": aiohttp.ClientTimeout(total=None),
        "connector": aiohttp.TCPConnector(force_close=True, limit=0),
        "headers": {"Authorization": f"Bearer {_KEY}"},
    }
    async with aiohttp.ClientSession(**options) as session:
        streams = [
            asyncio.create_task(_stream(session, url, prompts, GUIDANCE if n % 2 else None, traffic))
            for n in range(concurrency)
        ]
        spans: dict[str, dict[str, list[tuple[float, float]]]] = {name: {p: [] for p in PHASES} for name in LOADED}
        await _change(session, url, "load", {"name": _NAME, **LOADED["policy, 1.4 M"]})
        await _change(session, url, "unload", {"name": _NAME})
        for _ in track(range(rounds), "loading", console=console):
            for name, model in LOADED.items():
                loading = await _change(session, url, "load", {"name": _NAME, **model})
                unloading = await _change(session, url, "unload", {"name": _NAME})
                began = time.perf_counter()
                await asyncio.sleep(loading[1] - loading[0])
                for phase, span in zip(PHASES, ((began, time.perf_counter()), loading, unloading), strict=True):
                    spans[name][phase].append(span)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    models = {name: {p: summarise(traffic, own[p]) for p in PHASES} for name, own in spans.items()}
    return {"models": models, "requests": traffic.requests, "failures": traffic.failures}


def summarise(traffic: Traffic, spans: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Gaps, in milliseconds, that lie at least partly within the spans."""
    gaps = [
        [1e3 * (came - before) for came, before in traffic.chunks if came > began and before < ended]
        for began, ended in spans
    ]
    every = sorted(itertools.chain(*gaps))
    return {
        "seconds": statistics.median(ended - began for began, ended in spans),
        "gaps": len(every),
        "median_ms": statistics.median(every),
        "p99_ms": every[int(0.99 * len(every))],
        "longest_ms": every[-1],
        "longest_each_ms": [max(own) for own in gaps if own],
    }


def tabulate(models: dict[str, Any]) -> dict[str, list[str]]:
    """One line for each model and what happened."""
    rows = [(name, phase, models[name][phase]) for name in models for phase in PHASES]
    return {
        "model": [name for name, _, _ in rows],
        "meanwhile": [phase for _, phase, _ in rows],
        "seconds, median": [f"{row['seconds']:.2f}" for *_, row in rows],
        "gaps": [str(row["gaps"]) for *_, row in rows],
        "median ms": [f"{row['median_ms']:.1f}" for *_, row in rows],
        "p99 ms": [f"{row['p99_ms']:.1f}" for *_, row in rows],
        "longest ms, median of rounds": [f"{statistics.median(row['longest_each_ms']):.0f}" for *_, row in rows],
        "longest ms": [f"{row['longest_ms']:.0f}" for *_, row in rows],
    }


def describe(results: dict[str, Any], concurrency: int, rounds: int, busy: Sequence[float]) -> str:
    """What the table is of."""
    return (
        f"Gaps between the chunks of {concurrency} streams, half of them guided (PARGS, k = 10), each model loaded "
        f"{rounds} times. {results['requests']} requests, {len(results['failures'])} failed. Load average of the "
        f"machine ({os.cpu_count()} cores): {busy[0]:.1f} before, {busy[1]:.1f} after; the server and its clients are "
        "about 2 of it."
    )


async def _stream(
    session: aiohttp.ClientSession, url: str, prompts: Any, guidance: dict[str, Any] | None, traffic: Traffic
) -> None:
    fields = {"model": "demo", "max_tokens": _TOKENS, "ignore_eos": True, "stream": True}
    for prompt in prompts:
        body = {**fields, "prompt": prompt, **({} if guidance is None else {"guidance": guidance})}
        traffic.requests += 1
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                traffic.failures.append(await response.text())
                continue
            before = None
            async for line in response.content:
                if b'"error"' in line:
                    traffic.failures.append(line.decode())
                if line.startswith(b"data: {"):
                    now = time.perf_counter()
                    if before is not None:
                        traffic.chunks.append((now, before))
                    before = now


async def _change(session: aiohttp.ClientSession, url: str, what: str, body: dict[str, Any]) -> tuple[float, float]:
    """Loads or unloads; from when to when it took."""
    began = time.perf_counter()
    async with session.post(f"{url}/v1/admin/models/{what}", json=body) as response:
        if response.status != 200:
            raise RuntimeError(await response.text())
    return began, time.perf_counter()


if __name__ == "__main__":
    raise SystemExit(main())
