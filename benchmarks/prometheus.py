"""A real Prometheus beside a server: Debian's package, from the path or from where `make test` unpacks it."""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from steersman.processes import running

_START_LIMIT_S = 60


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus that answers queries."""

    url: str

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Series with their value at this moment; raises ValueError for a query that cannot be read."""
        return self._ask("query", {"query": expr})

    def query_range(self, expr: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """Series with their values in seconds from `start` to `end` since 1970, every `step`."""
        return self._ask("query_range", {"query": expr, "start": start, "end": end, "step": step})

    def _ask(self, path: str, params: Mapping[str, Any]) -> list[dict[str, Any]]:
        body = httpx.get(f"{self.url}/api/v1/{path}", params=dict(params), timeout=60).json()
        if body["status"] != "success":
            raise ValueError(f"{body['error']} in {params['query']}")
        result: list[dict[str, Any]] = body["data"]["result"]
        return result


@contextmanager
def run_prometheus(target: str, rules: Path) -> Iterator[Prometheus]:
    """Scrapes `target` (HOST:PORT) every second as the job `steersman`, for the duration of the context."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules.resolve())],
        "scrape_configs": [{"job_name": "steersman", "static_configs": [{"targets": [target]}]}],
    }
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
        file = Path(folder) / "prometheus.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [find_program("prometheus"), f"--config.file={file}", f"--storage.tsdb.path={folder}/data"]
        command += [f"--web.listen-address=127.0.0.1:{port}"]
        with running(command, stdout=log, stderr=subprocess.STDOUT) as process:
            _wait_until_ready(process, f"http://127.0.0.1:{port}", Path(log.name))
            yield Prometheus(f"http://127.0.0.1:{port}")


def find_program(name: str) -> str:
    """The path of `prometheus` or `promtool`."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.prefix) / "prometheus" / "usr" / "bin"))
    if found is None:
        raise FileNotFoundError(f"{name} is not installed; scripts/prometheus.sh unpacks Debian's package into .venv")
    return found


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/-/ready", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError(f"Prometheus did not start: {log.read_text(errors='replace')[-2000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
