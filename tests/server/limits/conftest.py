"""One server with a key and tight limits for every test in this folder; the last file of them stops it."""

from collections.abc import Iterator

import pytest

from tests.conftest import ONE_PROCESS
from tests.support.server import Server
from tests.support.tiny import save_base, save_reward

KEY, ADMIN_KEY = "key-of-a-user-7b1e", "key-of-an-administrator-93fd"
SECOND_KEY = "key-of-another-user-c4a8"
BODY_BYTES = 50_000
AT_ONCE, WAITING = 2, 2
TIMEOUT_S = 12
GUIDED = {"method": "pargs", "reward_model": "first"}


@pytest.fixture(scope="session")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves `base` with the reward model `first`."""
    folder = tmp_path_factory.mktemp("limited")
    base, first = save_base(folder / "base"), save_reward(folder / "first", seed=1)
    flags = [
        *(str(base), "--served-model-name", "base", "--dtype", "float32", "--enforce-eager"),
        *("--distributed-executor-backend", ONE_PROCESS, "--max-model-len", "512", "--max-num-seqs", "32"),
        *("--reward-model", f"first={first}", "--guidance-cache", "0.1", "--api-key", KEY, SECOND_KEY),
        *("--max-body-bytes", str(BODY_BYTES), "--request-timeout", str(TIMEOUT_S), "--log-format", "json"),
        *("--max-guided-requests", str(AT_ONCE), "--max-waiting-requests", str(WAITING)),
        *("--max-top-k", "20", "--max-samples", "500", "--max-n", "8", "--max-responses", "4"),
        *("--shutdown-timeout", "30"),
    ]
    # vLLM compiles a function for the first request with logprobs, which may take longer than the time limit.
    environment = {"STEERSMAN_ADMIN_API_KEY": ADMIN_KEY, "TORCHDYNAMO_DISABLE": "1"}
    with Server(folder / "log", *flags, environment=environment, key=KEY) as running:
        yield running
