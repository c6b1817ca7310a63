"""The commands as a user types them."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

import psutil
import pytest

from tests.server.polling import wait_until
from tests.support.server import free_port


def _run(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "steersman.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "160", **(environment or {})},
        timeout=400,
        check=False,
    )


def test_the_demo_shows_both_answers_with_their_rewards_and_stops() -> None:
    done = _run("demo", "--port", str(free_port()), environment={"ONCE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    for row in ("gold reward", "reward model that steers", "independent reward model"):
        plain, steered = _numbers(done.stdout, row)
        assert steered > plain, f"{row}: {plain} without guidance, {steered} with it"
    assert "curl http://127.0.0.1:" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_demo_that_is_ended_while_it_starts_leaves_no_server_behind(number: signal.Signals) -> None:
    port = free_port()
    command = [sys.executable, "-m", "steersman.cli", "demo", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as demo:
        try:
            wait_until(lambda: is_bound(port), "the server has bound its port", limit_s=300)
            [server] = psutil.Process(demo.pid).children()
            started = [server, *server.children(recursive=True)]
        finally:
            demo.send_signal(number)
        assert demo.wait(timeout=90) == (128 + number if number == signal.SIGTERM else -number)
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive
    assert not is_bound(port)


def is_bound(port: int) -> bool:
    """Whether a socket has the port, be it that nothing listens there yet."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def test_help_and_version_answer_at_once() -> None:
    assert "steersman COMMAND" in _run("--help").stdout
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", _run("--version").stdout)


@pytest.mark.parametrize("arguments", [("sail",), ("train",), ("train", "sails")])
def test_an_unknown_command_is_refused_with_what_there_is(arguments: Sequence[str]) -> None:
    done = _run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "usage" in (done.stdout + done.stderr).lower()


def _numbers(output: str, row: str) -> tuple[float, float]:
    line = next(line for line in output.splitlines() if row in line)
    plain, steered = (float(cell) for cell in line.split("│")[2:4])
    return plain, steered
