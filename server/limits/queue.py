"""Guided requests: so many at once, so many that wait for a turn or for room in the caches, and no more."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable

from starlette.responses import JSONResponse

from steersman.server.limits.refusals import refuse
from steersman.server.metrics.requests import TURN, WAITING

_RECENT = 32
_LONGEST_S = 60


class TooManyRequests(Exception):
    """HTTP 429: the queue is full."""

    def __init__(self, running: int, waiting: int, retry_after_s: int) -> None:
        super().__init__(
            f"the server runs at most {running} guided requests at once (--max-guided-requests) and {waiting} wait "
            f"already (--max-waiting-requests); try again in {retry_after_s} s"
        )
        self.retry_after_s = retry_after_s

    def response(self) -> JSONResponse:
        """With `Retry-After`."""
        return refuse(429, str(self), "too_many_requests", headers={"Retry-After": str(self.retry_after_s)})


class GuidedQueue:
    """First come, first served. A request that waits for room in a cache keeps its turn and counts as waiting."""

    def __init__(self, at_once: int, waiting: int, wait_for_room: Callable[[], int]) -> None:
        """at_once, waiting: limits. wait_for_room: how many requests wait for room in the caches."""
        self.at_once = at_once
        self.limit = waiting
        self._wait_for_room = wait_for_room
        self._turns = asyncio.Semaphore(at_once)
        self._entered = 0
        self._ended: deque[float] = deque(maxlen=_RECENT)

    @property
    def waiting(self) -> int:
        """Requests that wait for a turn or for room."""
        return max(0, self._entered - self.at_once) + self._wait_for_room()

    @property
    def running(self) -> int:
        """Requests that have their turn and need not wait for room."""
        return self._entered - self.waiting

    def enter(self) -> "Place":
        """A place for one request, which must be left in the end; raises TooManyRequests."""
        must_wait = self._entered >= self.at_once or self._wait_for_room() > 0
        if must_wait and self.waiting >= self.limit:
            raise TooManyRequests(self.at_once, self.waiting, self._retry_after_s())
        self._entered += 1
        return Place(self)

    def _retry_after_s(self) -> int:
        """The time in which as many requests ended lately as are waiting, and at least one."""
        if not self._ended:
            return 1
        rate = len(self._ended) / max(time.monotonic() - self._ended[0], 1e-3)
        return min(_LONGEST_S, max(1, math.ceil((self.waiting + 1) / rate)))

    async def _take_turn(self) -> None:
        began = time.perf_counter()
        with WAITING.track_inprogress():
            await self._turns.acquire()
        TURN.observe(time.perf_counter() - began)

    def _leave(self, had_turn: bool) -> None:
        self._entered -= 1
        if had_turn:
            self._turns.release()
            self._ended.append(time.monotonic())


class Place:
    """One request's place in the queue."""

    def __init__(self, queue: GuidedQueue) -> None:
        self._queue: GuidedQueue | None = queue
        self._has_turn = False

    async def turn(self) -> None:
        """Waits until the request may run."""
        if self._queue is not None:
            await self._queue._take_turn()
            self._has_turn = True

    def leave(self) -> None:
        """Makes room for the next; harmless when done twice."""
        queue, self._queue = self._queue, None
        if queue is not None:
            queue._leave(self._has_turn)
