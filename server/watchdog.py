"""A model that never returns: the worker says where it hangs and ends itself, so that requests get an error."""

import faulthandler
import logging
import threading
import time
from contextlib import AbstractContextManager

logger = logging.getLogger(__name__)

_TICKS = 10
"""Looks within the limit."""
_STDERR = 2


class Watchdog(AbstractContextManager[None]):
    """Ends this process with code 1 when a turn takes longer than `limit` seconds, up to a fifth more, after the stacks
    of all threads.

    A thread winds up faulthandler's timer again and again, and stops doing so for a turn that does not end. The timer
    needs no interpreter: code that hangs and keeps the interpreter's lock does not hold it up.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._since: float | None = None
        threading.Thread(target=self._look, name="steersman-watchdog", daemon=True).start()

    def turn(self) -> AbstractContextManager[None]:
        """What has to end in time; turns do not nest."""
        return self

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._since = None

    def _look(self) -> None:
        tick = self.limit / _TICKS
        seen = None
        while True:
            since = self._since
            if since is None or since != seen:
                faulthandler.dump_traceback_later(self.limit + tick, exit=True, file=_STDERR)
            elif time.monotonic() - since > self.limit:
                logger.critical(
                    "guidance has waited for a model for more than %g s: this process ends, and every request that it "
                    "holds; the stacks below say where it hangs",
                    self.limit,
                )
            seen = since
            time.sleep(tick)
