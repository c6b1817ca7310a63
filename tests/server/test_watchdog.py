"""A turn that does not end, ends its process and says where it hung; turns that end harm nobody."""

import subprocess
import sys

import pytest

LIMIT_S = 1.0
HANGS = {
    "waiting": "threading.Event().wait()",
    # Never lets go of the interpreter's lock: no other thread of Python runs.
    "busy": "re.match('(a+)+$', 'a' * 60 + 'b')",
}
PROGRAM = """
import re, threading, time
from steersman.server.watchdog import Watchdog
dog = Watchdog({limit})
began = time.monotonic()
while time.monotonic() - began < 2 * {limit}:
    with dog.turn():
        time.sleep({limit} / 9)
time.sleep(2 * {limit})
print("alive", flush=True)
with dog.turn():
    {hang}
print("never here")
"""


@pytest.mark.parametrize("hang", HANGS)
def test_a_turn_that_does_not_end_ends_the_process(hang: str) -> None:
    program = PROGRAM.format(limit=LIMIT_S, hang=HANGS[hang])
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (1, "alive\n")
    # The frame that hangs, by its line in the program.
    line = PROGRAM.splitlines().index("    {hang}") + 1
    assert f'File "<string>", line {line} in <module>' in run.stderr
    assert ("for more than 1 s" in run.stderr) == (hang == "waiting")
