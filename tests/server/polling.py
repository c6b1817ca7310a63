"""Waits for a condition with a deadline."""

import time
from collections.abc import Callable

from tests.support.server import Server


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 60) -> None:
    """Returns as soon as the condition holds; fails with `what` after the limit."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"after {limit_s} s still not: {what}"
        time.sleep(0.05)


def assert_no_block_stays_in_use(server: Server) -> None:
    """Requests that were hung up on give their blocks back a moment later."""
    wait_until(lambda: not any(server.blocks_in_use().values()), "every block of the auxiliary caches is free")
