"""Requests to a server, and their answers as tokens."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import openai


@dataclass(frozen=True)
class Asked:
    """A completion request with its prompt as tokens."""

    prompt: list[int]
    guidance: dict[str, Any] | None
    max_tokens: int
    fields: dict[str, Any]


@dataclass(frozen=True)
class Answered:
    """One choice of its answer."""

    tokens: list[int]
    guidance: dict[str, Any] | None


async def ask(client: openai.AsyncOpenAI, asked: Asked) -> list[Answered]:
    """Sends one request; returns its choices."""
    extra: dict[str, Any] = {"return_token_ids": True, **asked.fields}
    if asked.guidance is not None:
        extra["guidance"] = asked.guidance
    answer = await client.completions.create(
        model="base", prompt=asked.prompt, max_tokens=asked.max_tokens, extra_body=extra
    )
    return [Answered(c.token_ids, getattr(c, "guidance", None)) for c in answer.choices]  # type: ignore[attr-defined]


async def disconnect(client: openai.AsyncOpenAI, asked: Asked, after: int) -> None:
    """Streams a request and hangs up after some chunks."""
    stream = await client.completions.create(
        model="base",
        prompt=asked.prompt,
        max_tokens=asked.max_tokens,
        stream=True,
        extra_body={"guidance": asked.guidance} if asked.guidance else None,
        **asked.fields,
    )
    seen = 0
    async for _ in stream:
        seen += 1
        if seen >= after:
            break
    await stream.close()


async def gather_limited(limit: int, work: Sequence[Any]) -> list[Any]:
    """Awaits coroutines, at most `limit` at a time, in order."""
    gate = asyncio.Semaphore(limit)

    async def run(item: Any) -> Any:
        async with gate:
            return await item

    return await asyncio.gather(*(run(item) for item in work))
