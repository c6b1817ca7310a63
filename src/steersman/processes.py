"""Processes that end with the one that started them, however that one ends.

Run as a file, it becomes the command that it is given, tied to its parent. Imports nothing but the standard library.
"""

import ctypes
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

STOP_LIMIT_S = 60
"""For a process that was told to stop: a server drains its requests for 25 s by default and then ends its engine."""

_PARENT_DEATH_SIGNAL = 1


def end_with_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """Has the kernel send this process a signal when the parent's thread that started it ends; on Linux alone.

    parent: the process that must still be there. Raises SystemExit where it is gone already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, number)
    if os.getppid() != parent:
        raise SystemExit(f"the process {parent} that started this one is gone")


def exit_on_signals() -> None:
    """SIGTERM and SIGHUP raise SystemExit in the main thread, so that contexts are left; ignored ones stay ignored."""
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _exit)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        # By way of SIGTERM, for which vLLM has a handler of its own while it serves.
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))


def leave(code: int) -> NoReturn:
    """Ends this process, whose work is done, without the interpreter's own teardown: libraries in C++ that it still holds
    would print pages of what they call leaks."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextmanager
def running(
    command: Sequence[str], stop_limit_s: float = STOP_LIMIT_S, **options: Any
) -> Iterator[subprocess.Popen[Any]]:
    """A process in a session of its own for the duration of the context, to be entered in a thread that outlives it.

    options: of subprocess.Popen. On leaving it is told to stop; what is left of its process group after
    `stop_limit_s` is killed.
    """
    exit_on_signals()
    tied = [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]
    process: subprocess.Popen[Any] = subprocess.Popen(tied, start_new_session=True, **options)
    try:
        yield process
    finally:
        try:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=stop_limit_s)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def process_pool(workers: int, initializer: Callable[[], None] | None = None) -> Iterator[ProcessPoolExecutor]:
    """Spawned workers that end with this process; an exception ends them without waiting for what they do."""
    exit_on_signals()
    # A process that forks after CUDA or threads have begun could not use them.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _begin_worker, (os.getpid(), initializer)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _begin_worker(parent: int, initializer: Callable[[], None] | None) -> None:
    end_with_parent(parent, signal.SIGKILL)
    if initializer is not None:
        initializer()


def _become(arguments: Sequence[str]) -> None:
    parent, *command = arguments
    end_with_parent(int(parent))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise SystemExit(f"{command[0]}: {error.strerror}") from error


if __name__ == "__main__":
    _become(sys.argv[1:])
