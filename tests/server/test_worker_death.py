"""The engine killed in the middle of streams: an error and no silence, health that fails, and an exit that a supervisor
understands."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import ONE_PROCESS
from tests.support.server import Server

GUIDED = {"method": "pargs", "reward_model": "first", "beta": 1.5, "top_k": 5}
HEALTH_LIMIT_S = 5.0
"""After it a balancer must know."""


@pytest.fixture
def doomed(models: Path, tmp_path: Path) -> Iterator[Server]:
    flags = (str(models / "base"), "--served-model-name", "base", "--dtype", "float32", "--enforce-eager")
    sizes = ("--max-model-len", "512", "--max-num-seqs", "8", "--distributed-executor-backend", ONE_PROCESS)
    with Server(tmp_path / "log", *flags, *sizes, "--reward-model", f"first={models / 'first'}") as server:
        yield server


def test_a_killed_engine_ends_every_stream_with_an_error_and_the_process_with_a_code(doomed: Server) -> None:
    unhealthy_after, endings = asyncio.run(_kill_under_load(doomed))
    assert unhealthy_after < HEALTH_LIMIT_S
    for body, ending in endings.items():
        assert "error" in ending, f"{body} ended with {ending[-300:]!r}"
    assert doomed.process.wait(timeout=60) == 1
    assert "steersman: the server stopped: the engine has died" in doomed.log.read_text()


async def _kill_under_load(server: Server) -> tuple[float, dict[str, str]]:
    """Seconds until health fails, and the last event of each stream, or the exception's name that cut it."""
    (engine,) = [p for p in psutil.Process(server.process.pid).children() if "EngineCore" in p.name()]
    bodies = {
        name: {"model": "base", "prompt": name, "max_tokens": 480, "ignore_eos": True, "stream": True, **extra}
        for name, extra in {
            "plain": {},
            "guided": {"guidance": GUIDED},
            "several": {"guidance": GUIDED, "n": 2},
        }.items()
    }
    under_way = {name: asyncio.Event() for name in bodies}

    async def stream(client: httpx.AsyncClient, name: str) -> str:
        last = ""
        async with client.stream("POST", "/v1/completions", json=bodies[name]) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    last = line
                    under_way[name].set()
        return last

    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        streams = [asyncio.ensure_future(stream(client, name)) for name in bodies]
        for event in under_way.values():
            await event.wait()
        engine.kill()
        began = time.monotonic()
        while (await client.get("/health")).status_code == 200:
            assert time.monotonic() - began < 10 * HEALTH_LIMIT_S, "health never failed"
            await asyncio.sleep(0.05)
        unhealthy_after = time.monotonic() - began
        return unhealthy_after, dict(zip(bodies, await asyncio.gather(*streams), strict=True))
