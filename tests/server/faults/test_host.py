"""What the machine does to a server that is in the middle of streams: a full disk, and a clock that steps."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.server.faults.streams import GUIDED, read_streams, streamed
from tests.server.faults.supervised import SupervisedServer
from tests.support.metrics import growth, read_metrics, total
from tests.support.traffic import random_prompts

TOKENS = 300
DAY = 86_400
KINDS: list[dict[str, Any]] = [{}, {"guidance": GUIDED}, {"guidance": GUIDED, "n": 2, "seed": 3, "temperature": 1}]


def test_a_full_disk_for_the_log_costs_nothing_but_log_lines(supervised: SupervisedServer, rng: random.Random) -> None:
    bodies, log = _bodies(rng), supervised.log
    expected = _read(supervised, bodies)
    size = log.stat().st_size
    try:
        # A write beyond this fails as on a full disk, and writes nothing.
        assert _read(supervised, bodies, lambda: supervised.limit_files(size)) == expected
        refused = supervised.post("/v1/completions", {"model": "base", "prompt": "a", "guidance": {"method": "none"}})
        assert refused.status_code == 400
        assert log.stat().st_size == size
    finally:
        supervised.limit_files(-1)
    assert _read(supervised, bodies) == expected
    assert log.stat().st_size > size, "nothing was to be logged: this test shows nothing"


def test_a_clock_that_steps_ends_no_request(supervised: SupervisedServer, rng: random.Random) -> None:
    bodies, clock = _bodies(rng), Path(supervised.environment["STEERSMAN_WALL_CLOCK"])
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


def _bodies(rng: random.Random) -> list[dict[str, Any]]:
    return [streamed(prompt, TOKENS, **kind) for prompt, kind in zip(random_prompts(rng, 3), KINDS, strict=True)]


def _read(
    supervised: SupervisedServer, bodies: list[dict[str, Any]], act: Callable[[], object] = lambda: None
) -> list[list[list[int]]]:
    async def perform(client: httpx.AsyncClient) -> None:
        act()

    return [stream.tokens for stream in read_streams(supervised, bodies, perform)]
