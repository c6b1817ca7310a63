from pathlib import Path

import pytest

from tests.support.training import write_task


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny task, its model far enough from uniform that rounding does not decide."""
    return write_task(tmp_path_factory.mktemp("policies"), initializer_range=0.1)
