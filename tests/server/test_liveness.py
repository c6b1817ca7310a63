"""A worker that has died is told at once, whether or not its parent has noticed."""

import subprocess
import sys
import time

from steersman.server.liveness import Workers, own_address


def test_a_killed_process_is_lost_before_and_after_its_parent_has_noticed() -> None:
    host, _ = own_address()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        workers = Workers([(host, process.pid)])
        assert workers.lost() is None
        process.kill()
        deadline = time.monotonic() + 30
        while workers.lost() is None:
            assert time.monotonic() < deadline, "it died and was not missed"
        assert process.returncode is None
        process.wait()
        lost = workers.lost()
        assert lost is not None
        assert lost.pid == process.pid


def test_processes_of_another_host_or_container_are_not_looked_for() -> None:
    host, _ = own_address()
    assert Workers([(f"not-{host}", 2**22 + 1), (host, 2**22 + 1)]).lost() is None
