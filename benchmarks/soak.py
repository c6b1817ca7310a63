"""`python -m steersman.benchmarks.soak`: mixed traffic for half an hour; memory, latency and caches must stay flat."""

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
from rich.console import Console

from steersman.benchmarks.common.demo import demo_server, read_prompts
from steersman.benchmarks.common.results import RESULTS
from steersman.benchmarks.load import METHODS
from steersman.benchmarks.quality import progress_bar
from steersman.benchmarks.soak_report import Done, Sample, Soak, find

_EVERY = 5.0
"""Seconds between two samples of memory."""
_HANGING_UP = 0.05
"""Share of the clients that go before their answer has ended."""


def main(argv: Sequence[str]) -> int:
    """Writes RESULTS/soak.json, .md and .png; returns 1 where something did not stay flat."""
    parser = argparse.ArgumentParser(prog="python -m steersman.benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(list(argv))
    with demo_server(None, 8037) as url:
        soak = asyncio.run(_soak(url, 60 * args.minutes, args.concurrency))
    finding = find(soak)
    finding.write(args.out / "soak", Console())
    return 0 if finding.data["flat"] else 1


async def _soak(url: str, seconds: float, concurrency: int) -> Soak:
    soak = Soak(concurrency=concurrency)
    prompts, began = read_prompts("reporting"), time.monotonic()
    server = _server_process(url)
    with progress_bar() as progress:
        task = progress.add_task("soaking", total=seconds)

        async def watch() -> None:
            while (now := time.monotonic() - began) < seconds:
                soak.memory.append(Sample(now, _memory(server)))
                progress.update(task, completed=now)
                await asyncio.sleep(_EVERY)

        async def client(session: aiohttp.ClientSession) -> None:
            while time.monotonic() - began < seconds:
                soak.done.append(await _ask(session, random.choice(prompts), began))

        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(url, connector=connector) as session:
            await asyncio.gather(watch(), *(client(session) for _ in range(concurrency)))
    soak.blocks_left = await _blocks_left(url)
    return soak


async def _ask(session: aiohttp.ClientSession, prompt: str, began: float) -> Done:
    """One streamed request; now and then its client hangs up in the middle."""
    method = random.choice(["plain", *METHODS])
    length, hangs_up = random.randint(16, 160), random.random() < _HANGING_UP
    body: dict[str, Any] = {"model": "demo", "prompt": prompt, "max_tokens": length, "temperature": 1.0, "stream": True}
    if method in METHODS:
        body["guidance"] = METHODS[method]
    gaps: list[float] = []
    error, last = "", None
    try:
        async with session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                error = (await response.text())[:300]
            async for line in response.content:
                if line.startswith(b'data: {"error"'):
                    error = line.decode(errors="replace")[:300]
                elif line.startswith(b"data: {"):
                    now = time.monotonic()
                    if last is not None:
                        gaps.append(now - last)
                    last = now
                    if hangs_up and len(gaps) > length // 4:
                        break
    except (aiohttp.ClientError, TimeoutError) as failure:
        error = repr(failure)
    return Done(time.monotonic() - began, method, hangs_up, error, tuple(gaps))


def _server_process(url: str) -> psutil.Process:
    """The process that listens on the server's port."""
    port = int(url.rpartition(":")[2])
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            return psutil.Process(connection.pid)
    raise RuntimeError(f"nothing listens on {url}")


def _memory(server: psutil.Process) -> dict[str, int]:
    """Process → bytes that it alone holds (its unique set), for the server and all below it."""
    found = {}
    for process in (server, *server.children(recursive=True)):
        name = "API process" if process == server else f"{process.name()} {process.pid}"
        try:
            found[name] = process.memory_full_info().uss
        except psutil.Error:
            continue
    return found


async def _blocks_left(url: str) -> float:
    """Auxiliary cache blocks that are still held once nothing runs."""
    held = -1.0
    for _ in range(100):
        lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
        held = sum(float(line.split()[-1]) for line in lines if line.startswith("steersman_cache_blocks_in_use{"))
        if held == 0:
            break
        await asyncio.sleep(0.1)
    return held


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
