"""The demo server and its prompts, as benchmarks use them."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from steersman.demo import WORLD, serving


@contextmanager
def demo_server(url: str | None, port: int = 8031, flags: Sequence[str] = ()) -> Iterator[str]:
    """The address of a running server, or of a demo server started for the duration of the context."""
    if url is not None:
        yield url.rstrip("/")
        return
    with serving(port, flags, Console()) as (_, started):
        yield started


def read_prompts(name: str) -> list[str]:
    """The demo world's `tuning` or `reporting` prompts; the two are disjoint."""
    with (WORLD / "prompts" / f"{name}.jsonl").open() as rows:
        return [str(json.loads(row)["prompt"]) for row in rows]
