"""Waits for a condition with a deadline."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

import httpx

from tests.support.server import Server

HEALTH_LIMIT_S = 5.0
"""After it a balancer must know of a dead engine."""


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 60) -> None:
    """Returns as soon as the condition holds; fails with `what` after the limit."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"after {limit_s} s still not: {what}"
        time.sleep(0.05)


def assert_no_block_stays_in_use(server: Server) -> None:
    """Requests that were hung up on give their blocks back a moment later."""
    wait_until(lambda: not any(server.blocks_in_use().values()), "every block of the auxiliary caches is free")


async def wait_until_unhealthy(client: httpx.AsyncClient) -> float:
    """Seconds until health fails."""
    began = time.monotonic()
    with suppress(httpx.TransportError):
        while (await client.get("/health")).status_code == 200:
            assert time.monotonic() - began < 10 * HEALTH_LIMIT_S, "health has not failed"
            await asyncio.sleep(0.05)
    return time.monotonic() - began
