"""Whether the workers are there: vLLM takes some ten seconds to give up a group of which one has died."""

import os
import socket
from collections.abc import Iterable

import psutil

Address = tuple[str, int]
"""A process's host and number."""


def own_address() -> Address:
    """Of the process that asks."""
    return socket.gethostname(), os.getpid()


class Workers:
    """The workers below this process; those that another host or container runs are left to vLLM."""

    def __init__(self, addresses: Iterable[Address]) -> None:
        own_host = socket.gethostname()
        numbers = {pid for host, pid in addresses if host == own_host}
        self._processes = [p for p in psutil.Process().children(recursive=True) if p.pid in numbers]

    def lost(self) -> psutil.Process | None:
        """One that has died, if there is one."""
        return next((process for process in self._processes if not _is_alive(process)), None)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
