"""Fresh random input for every test."""

import random

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
