"""Reports of finished choices, asked of the workers: those that finish in the same moment in one call."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from steersman.guidance.report import merge_reports

Finished = tuple[str, int | None, list[int]]
"""A request's key, the choice's seed, and its tokens."""
Report = dict[str, Any]


class ReportCollector:
    """A call waits for the end of the step that the worker is in, and holds the next one up: a hundred choices of one
    request that end together must not be a hundred calls."""

    def __init__(
        self, finish: Callable[[list[Finished]], Awaitable[list[list[Report | None] | None]]], *, sharded: bool
    ) -> None:
        """finish: asks every worker for the reports of these choices; None from one that does not sample.

        sharded: whether each worker guides, and reports on, a part of the positions only.
        """
        self._finish = finish
        self._sharded = sharded
        self._waiting: list[tuple[Finished, asyncio.Future[Report | None]]] = []
        self._calls: set[asyncio.Task[None]] = set()

    def collect(self, finished: Finished) -> asyncio.Future[Report | None]:
        """Releases a choice, also if nobody waits for its report; None where the workers know nothing of it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Report | None] = loop.create_future()
        if not self._waiting:
            call = loop.create_task(self._call())
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        self._waiting.append((finished, future))
        return future

    async def _call(self) -> None:
        # Behind everything that this turn of the event loop still brings.
        await asyncio.sleep(0)
        waiting, self._waiting = self._waiting, []
        try:
            replies = [
                reply for reply in await self._finish([finished for finished, _ in waiting]) if reply is not None
            ]
            reports = [self._merge(found) for found in zip(*replies, strict=True)] or [None] * len(waiting)
        except BaseException as error:
            for _, future in waiting:
                if not future.done():
                    future.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        for (_, future), report in zip(waiting, reports, strict=True):
            # A caller that has gone wanted the choice released, which it is.
            if not future.done():
                future.set_result(report)

    def _merge(self, found: tuple[Report | None, ...]) -> Report | None:
        reports = [report for report in found if report is not None]
        if not reports:
            return None
        return merge_reports(reports) if self._sharded else reports[0]
