"""A closed loop of clients: each sends its next request as soon as the last one is answered."""

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass(frozen=True)
class Load:
    """How much is asked for, and in which way."""

    concurrency: int
    requests: int
    max_tokens: int
    stream: bool = False


@dataclass
class Measurement:
    """One arm's requests."""

    seconds: float = 0.0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    """Seconds between two chunks of one stream."""
    reports: list[dict[str, Any]] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all requests together."""
        return self.tokens / self.seconds


async def run_load(
    url: str,
    prompts: Sequence[str],
    guidance: dict[str, Any] | None,
    load: Load,
    model: str = "demo",
) -> Measurement:
    """Completions of exactly `load.max_tokens` tokens, `load.concurrency` at a time."""
    result = Measurement()
    start = random.randrange(len(prompts))
    queue = iter(list(itertools.islice(itertools.cycle(prompts), start, start + load.requests)))

    async def client(session: aiohttp.ClientSession) -> None:
        for prompt in queue:
            body = {
                "model": model,
                "prompt": prompt,
                "max_tokens": load.max_tokens,
                "ignore_eos": True,
                "temperature": 1.0,
                "stream": load.stream,
                **({} if guidance is None else {"guidance": guidance}),
            }
            async with session.post(f"{url}/v1/completions", json=body) as response:
                if response.status != 200:
                    raise RuntimeError(await response.text())
                await (_read_stream(response, result) if load.stream else _read_body(response, result))

    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        began = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(load.concurrency)))
        result.seconds = time.perf_counter() - began
    result.tokens = load.requests * load.max_tokens
    return result


async def _read_body(response: aiohttp.ClientResponse, result: Measurement) -> None:
    choice = (await response.json())["choices"][0]
    if choice.get("guidance") is not None:
        result.reports.append(choice["guidance"])


async def _read_stream(response: aiohttp.ClientResponse, result: Measurement) -> None:
    last = None
    async for line in response.content:
        if line.startswith(b"data: {"):
            now = time.perf_counter()
            if last is not None:
                result.gaps.append(now - last)
            last = now
