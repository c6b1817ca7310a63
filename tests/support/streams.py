"""Streams as a client without a library sees them."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.support.random_input import random_prompts
from tests.support.server import Server

GUIDED: dict[str, Any] = {"method": "pargs", "reward_model": "first", "beta": 1.5, "top_k": 5}


def streamed(prompt: Any, tokens: int, **fields: Any) -> dict[str, Any]:
    """A completion's body: exactly so many tokens, one stream."""
    asked = {"model": "base", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    return {**asked, "temperature": 0, "return_token_ids": True, **fields}


@dataclass
class Stream:
    """What one stream has brought so far."""

    events: list[str] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> "Stream":
        """To its end."""
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                self.take(line)
        return self

    def take(self, line: str) -> None:
        """One line of the answer."""
        if line.startswith("data: "):
            self.events.append(line.removeprefix("data: "))
            self.begun.set()

    @property
    def tokens(self) -> list[list[int]]:
        """Of every choice of a stream that has come to its end."""
        assert self.events[-1] == "[DONE]", self.events[-1]
        chunks = [choice for event in self.events[:-1] for choice in json.loads(event)["choices"]]
        choices: dict[int, list[int]] = {chunk["index"]: [] for chunk in sorted(chunks, key=lambda c: c["index"])}
        for chunk in chunks:
            choices[chunk["index"]] += chunk.get("token_ids") or ()
        return list(choices.values())

    @property
    def error(self) -> dict[str, Any] | None:
        """The error that it ended with."""
        last = next((json.loads(event) for event in reversed(self.events) if event != "[DONE]"), {})
        return last.get("error")


async def _nothing(client: httpx.AsyncClient) -> None:
    """What happens to most streams."""


def read_streams(
    server: Server,
    bodies: Sequence[Mapping[str, Any]],
    act: Callable[[httpx.AsyncClient], Awaitable[object]] = _nothing,
) -> list[Stream]:
    """All at once, to their ends; acts when each has begun."""

    async def run() -> list[Stream]:
        streams = [Stream() for _ in bodies]
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            reading = [asyncio.ensure_future(s.read(client, body)) for s, body in zip(streams, bodies, strict=True)]
            for stream in streams:
                await stream.begun.wait()
            assert not any(task.done() for task in reading), "the streams are too short"
            await act(client)
            await asyncio.gather(*reading)
        return streams

    return asyncio.run(run())


def mixed_bodies(rng: random.Random, tokens: int) -> list[dict[str, Any]]:
    """A plain request, a guided one, and one with two guided choices."""
    kinds = [{}, {"guidance": GUIDED}, {"guidance": GUIDED, "n": 2, "seed": 3, "temperature": 1}]
    return [streamed(prompt, tokens, **kind) for prompt, kind in zip(random_prompts(rng, 3), kinds, strict=True)]


def assert_all_failed(streams: Sequence[Stream]) -> None:
    """Each has ended with an error."""
    for stream in streams:
        assert stream.error, f"ended with {stream.events[-1:]}"
