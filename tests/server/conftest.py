"""What tests against the shared servers have in common."""

from pathlib import Path

import pytest

from tests.support.oracle import Oracle, load_oracle
from tests.support.server import Server


@pytest.fixture(scope="session")
def oracle(models: Path) -> Oracle:
    """The reference over the shared servers' models."""
    return load_oracle(models)


@pytest.fixture(scope="module", params=["V1", "V2"])
def interface(request: pytest.FixtureRequest) -> Server:
    """The shared server over each of vLLM's model runners."""
    return request.getfixturevalue("server" if request.param == "V1" else "server_v2")
