"""What the machine does to a server that is in the middle of streams: a full disk, and a clock that steps."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.server.faults.supervised import SupervisedServer
from tests.support.metrics import growth, read_metrics, total
from tests.support.streams import mixed_bodies, read_streams

TOKENS = 300
DAY = 86_400


def test_a_full_disk_for_the_log_costs_nothing_but_log_lines(supervised: SupervisedServer, rng: random.Random) -> None:
    bodies, log = mixed_bodies(rng, TOKENS), supervised.log
    expected, sizes = _read(supervised, bodies), []

    def fill_disk() -> None:
        # A write beyond this fails as on a full disk, and writes nothing.
        sizes.append(log.stat().st_size)
        supervised.limit_files(sizes[0])

    try:
        assert _read(supervised, bodies, fill_disk) == expected
        refused = supervised.post("/v1/completions", {"model": "base", "prompt": "a", "guidance": {"method": "none"}})
        assert refused.status_code == 400
        assert log.stat().st_size == sizes[0]
    finally:
        supervised.limit_files(-1)
    assert _read(supervised, bodies) == expected
    assert log.stat().st_size > sizes[0], "nothing was to be logged: this test shows nothing"


def test_a_clock_that_steps_ends_no_request(supervised: SupervisedServer, rng: random.Random) -> None:
    bodies, clock = mixed_bodies(rng, TOKENS), Path(supervised.environment["STEERSMAN_WALL_CLOCK"])
    expected, before = _read(supervised, bodies), read_metrics(supervised)
    try:
        for offset in (DAY, -DAY, 0):
            assert _read(supervised, bodies, lambda offset=offset: clock.write_text(str(offset))) == expected
            created = supervised.complete("the lamp", max_tokens=1)["created"]
            assert abs(created - time.time() - offset) < 60, "the server has not seen the step"
    finally:
        clock.write_text("0")
    grown = growth(before, read_metrics(supervised))
    for (name, _), value in grown.items():
        if name.startswith("steersman_") and "seconds" in name:
            assert 0 <= value < DAY / 2, f"{name} grew by {value}"
    assert total(grown, "steersman_requests_total", outcome="finished") == 2 * 3


def _read(
    supervised: SupervisedServer, bodies: list[dict[str, Any]], act: Callable[[], object] = lambda: None
) -> list[list[list[int]]]:
    async def perform(client: httpx.AsyncClient) -> None:
        act()

    return [stream.tokens for stream in read_streams(supervised, bodies, perform)]
