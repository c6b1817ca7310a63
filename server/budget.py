"""Admission: a guided request waits until the auxiliary caches have room for the longest it may become."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from steersman.server.metrics.requests import RESERVED


class CacheBudget:
    """Cache blocks by model. First come, first served; a request takes all that it may need at once, so requests
    that wait hold nothing and none can lock another out."""

    def __init__(self, capacity: Mapping[str, int]) -> None:
        self.capacity = dict(capacity)
        self.free = dict(capacity)
        for name in capacity:
            self._show(name)
        self._waiting: deque[tuple[Mapping[str, int], asyncio.Future[None]]] = deque()

    @property
    def waiting(self) -> int:
        """Requests that wait for room."""
        return len(self._waiting)

    def add(self, name: str, blocks: int) -> None:
        """A model that is loaded later."""
        self.capacity[name] = self.free[name] = blocks
        self._show(name)

    def remove(self, name: str) -> None:
        """A model that nobody uses any more."""
        self.capacity.pop(name, None)
        self.free.pop(name, None)

    def too_large(self, wanted: Mapping[str, int]) -> str | None:
        """The model whose whole cache is smaller than what is wanted, if there is one."""
        return next((name for name, blocks in wanted.items() if blocks > self.capacity[name]), None)

    @asynccontextmanager
    async def reserve(self, wanted: Mapping[str, int]) -> AsyncIterator[None]:
        """Holds `wanted` blocks for the duration of the context, waiting for them in turn; who wants none never
        waits."""
        if wanted and (self._waiting or not self._fits(wanted)):
            await self._wait(wanted)
        else:
            self._take(wanted)
        try:
            yield
        finally:
            self._give_back(wanted)

    async def _wait(self, wanted: Mapping[str, int]) -> None:
        turn = asyncio.get_running_loop().create_future()
        entry = (wanted, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # its turn had come
                self._give_back(wanted)
            elif entry in self._waiting:
                self._waiting.remove(entry)
                self._admit_next()
            raise

    def _fits(self, wanted: Mapping[str, int]) -> bool:
        return all(self.free[name] >= blocks for name, blocks in wanted.items())

    def _take(self, wanted: Mapping[str, int]) -> None:
        for name, blocks in wanted.items():
            self.free[name] -= blocks
            self._show(name)

    def _give_back(self, wanted: Mapping[str, int]) -> None:
        for name, blocks in wanted.items():
            self.free[name] += blocks
            self._show(name)
        self._admit_next()

    def _admit_next(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            wanted, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._take(wanted)
                turn.set_result(None)

    def _show(self, name: str) -> None:
        RESERVED.labels(name).set(self.capacity[name] - self.free[name])
