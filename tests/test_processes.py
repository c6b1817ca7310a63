"""Whatever ends a command of ours, what it started ends with it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

_LIMIT_S = 60

_SLEEPER = "import pathlib, os, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)"

_AS_FROM_A_TERMINAL = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""
"""Whoever runs the tests in the background may have had these ignored."""

_RUNNING = f"""
import sys, time
from steersman.processes import running
with running([sys.executable, "-c", {_SLEEPER!r}, sys.argv[1]], 5):
    time.sleep(600)
"""

_DEAF = _RUNNING.replace("import pathlib", "import signal; signal.signal(15, signal.SIG_IGN); import pathlib")

_POOL = """
import os, pathlib, sys, time
from steersman.processes import process_pool

def work(path):
    pathlib.Path(path + ".new").write_text(str(os.getpid()))
    os.rename(path + ".new", path)
    time.sleep(600)

if __name__ == "__main__":
    with process_pool(1) as pool:
        pool.submit(work, sys.argv[1]).result()
"""


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {_LIMIT_S} s: {what}"
        time.sleep(0.02)


def _start(program: str, folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A process that runs the program, and the id of the process that it has started."""
    script, found = folder / "program.py", folder / "child"
    script.write_text(_AS_FROM_A_TERMINAL + program)
    parent = subprocess.Popen([sys.executable, str(script), str(found)], stderr=subprocess.DEVNULL)
    _wait_until(lambda: found.exists() and found.read_text() != "", "the child has begun")
    return parent, int(found.read_text())


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("program", [_RUNNING, _POOL], ids=["process", "pool"])
def test_no_signal_leaves_a_process_behind(program: str, number: signal.Signals, tmp_path: Path) -> None:
    parent, child = _start(program, tmp_path)
    parent.send_signal(number)
    parent.wait(timeout=_LIMIT_S)
    _wait_until(lambda: not _is_running(child), "the child has ended")


def test_a_process_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    parent, child = _start(_DEAF, tmp_path)
    parent.terminate()
    assert parent.wait(timeout=_LIMIT_S) == 128 + signal.SIGTERM
    assert not _is_running(child)


def test_an_exception_ends_workers_without_waiting_for_their_work(tmp_path: Path) -> None:
    program = _POOL.replace(
        "pool.submit(work, sys.argv[1]).result()",
        "pool.submit(work, sys.argv[1])\n"
        "        while not os.path.exists(sys.argv[1]): time.sleep(0.02)\n"
        "        raise ValueError",
    )
    parent, child = _start(program, tmp_path)
    assert parent.wait(timeout=_LIMIT_S) == 1
    assert not _is_running(child)


def test_an_ignored_hangup_stays_ignored(tmp_path: Path) -> None:
    parent, child = _start("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + _RUNNING, tmp_path)
    parent.send_signal(signal.SIGHUP)
    parent.terminate()
    assert parent.wait(timeout=_LIMIT_S) == 128 + signal.SIGTERM
    _wait_until(lambda: not _is_running(child), "the child has ended")


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"""
import sys
from steersman.processes import running
with running([{str(tmp_path / "sail")!r}]) as process:
    sys.exit(process.wait())
"""],
        capture_output=True, text=True, timeout=_LIMIT_S, env=dict(os.environ), check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"{tmp_path / 'sail'}: No such file" in done.stderr
