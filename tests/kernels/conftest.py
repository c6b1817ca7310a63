"""Fresh random input for every test, on the GPU where there is one."""

import random
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds torch and Python; printed when a test fails."""
    value = random.randrange(2**31)
    print(f"seed {value}")
    random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """Where tensors are made."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu") as chosen:
        yield chosen
