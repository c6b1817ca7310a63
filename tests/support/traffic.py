"""Random requests for tests that compare whole answers with the reference."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import openai

from tests.support.tiny import VOCABULARY


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


def random_prompts(rng: random.Random, count: int, shortest: int = 1, longest: int = 90) -> list[list[int]]:
    """Prompts of which about half begin like an earlier one, so that prefixes are found again."""
    prompts: list[list[int]] = []
    for _ in range(count):
        start = rng.choice(prompts)[: rng.randrange(longest)] if prompts and rng.random() < 0.5 else []
        length = rng.randint(shortest, longest)
        prompts.append((start + [rng.randrange(2, VOCABULARY - 8) for _ in range(length)])[:length])
    return prompts


def random_guidance(rng: random.Random, models: Sequence[str] = ("first", "second")) -> dict[str, Any]:
    """Any reward guidance that the reference knows."""
    strength = {"beta": round(rng.uniform(0.2, 3), 3), "top_k": rng.choice([1, 3, 10, 10, 17])}
    if rng.random() < 0.3:
        transform = rng.choice(
            [
                {"transform": "log_sigmoid", "reference": 0.3},
                {"transform": "affine", "scale": -0.7, "shift": 2.0},
                {},
            ]
        )
        first = {"model": models[0], "weight": round(rng.uniform(-1, 2), 3)}
        return {"method": "pargs", "rewards": [first, {"model": models[1], **transform}], **strength}
    method = rng.choice(["pargs", "args"])
    return {"method": method, "reward_model": rng.choice(models), "end_token": rng.random() < 0.3, **strength}


async def ask(client: openai.AsyncOpenAI, asked: Asked) -> list[Answered]:
    """Sends one request; returns its choices."""
    extra: dict[str, Any] = {"return_token_ids": True}
    if asked.guidance is not None:
        extra["guidance"] = asked.guidance
    answer = await client.completions.create(
        model="base", prompt=asked.prompt, max_tokens=asked.max_tokens, extra_body=extra, **asked.fields
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
