"""The client runs where neither torch nor vLLM is installed."""

import subprocess
import sys

_PROBE = """
import sys
import steersman.clients.client
heavy = sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'vllm', 'transformers', 'numpy'})
assert not heavy, heavy
"""


def test_importing_the_client_imports_no_torch() -> None:
    outcome = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=120)
    assert outcome.returncode == 0, outcome.stderr
