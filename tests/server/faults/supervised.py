"""A server that a supervisor starts again whenever it ends with a code other than 0."""

import contextlib
import resource
import subprocess
import sys
from pathlib import Path

import psutil

from tests.server.polling import wait_until
from tests.support.server import Server

_SUPERVISE = 'until "$@" >> "$LOG" 2>&1; do echo $? >> "$CODES"; done'


class SupervisedServer(Server):
    """`process` is the supervisor."""

    @property
    def codes(self) -> list[int]:
        """The codes that the server has ended with."""
        file = self._codes
        return [int(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def processes(self) -> dict[str, psutil.Process]:
        """The API process (`api`) and the engine's (`engine`)."""
        (api,) = [p for p in psutil.Process(self.process.pid).children() if "python" in p.cmdline()[0]]
        # What the engine calls itself depends on how much room its first arguments and environment left for a name.
        below = {p: " ".join(p.cmdline()) for p in api.children()}
        engine, *others = [p for p, command in below.items() if "resource_tracker" not in command]
        assert not others, below
        return {"api": api, "engine": engine}

    def limit_files(self, size: int) -> None:
        """No process of the server may write beyond this many bytes of a file."""
        for process in self.processes.values():
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def wait_for_restart(self, after: int) -> None:
        """Until the server is back that has ended `after` times before."""
        wait_until(lambda: len(self.codes) > after, "the server has ended")
        self._wait_until_ready()

    def __exit__(self, *_: object) -> None:
        served = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        for process in served:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(served, timeout=30)[1]:
            process.kill()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "steersman.cli", "serve", *self.flags, "--port", str(self.port)]
        environment = {**self.environment, "LOG": str(self.log), "CODES": str(self._codes)}
        return subprocess.Popen(["bash", "-c", _SUPERVISE, "supervisor", *command], env=environment)

    @property
    def _codes(self) -> Path:
        return self.log.with_name("codes")
