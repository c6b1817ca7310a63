"""Where processes leave their numbers, so that one of them can show all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


@contextmanager
def metrics_directory() -> Iterator[None]:
    """A fresh folder for this server's run, inside of `PROMETHEUS_MULTIPROC_DIR` where that is set.

    prometheus_client decides when it is imported whether its numbers live in memory or in files there: nothing may
    import it before.
    """
    outer = os.environ.get(_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="steersman-metrics-", dir=outer, ignore_cleanup_errors=True) as folder:
        os.environ[_VARIABLE] = folder
        try:
            yield
        finally:
            if outer is None:
                del os.environ[_VARIABLE]
            else:
                os.environ[_VARIABLE] = outer
