"""Progress as plain lines, which read well also where two processes write to one terminal or to a log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], description: str, lines: int = 5) -> Iterator[T]:
    """The items, with a line printed at every `lines`-th part of them."""
    start, printed = time.monotonic(), 0
    for count, item in enumerate(items, 1):
        yield item
        if count * lines // len(items) > printed:
            printed = count * lines // len(items)
            print(f"{description}: {100 * count // len(items)} %, {time.monotonic() - start:.0f} s", flush=True)
