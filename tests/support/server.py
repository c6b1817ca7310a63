"""Starts the real server in a process of its own, as a user would."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import openai

from steersman.server.cpu import SMALL

_START_LIMIT_S = 400

V2_ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TRITON_INTERPRET": "1",
    "PYTHONPATH": str(Path(__file__).parent / "triton_cpu"),
}
"""Makes vLLM use Model Runner V2 on a CPU, its kernels interpreted."""


class Server:
    """`steersman serve` with the given flags on a free port, for the duration of a `with`."""

    def __init__(self, log: Path, *flags: str, environment: dict[str, str] | None = None, key: str = "none") -> None:
        self.log = log
        self.key = key
        self.flags = flags
        self.port = free_port()
        self.environment = {**test_environment(), **(environment or {})}

    @property
    def url(self) -> str:
        """Address without a path."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> openai.OpenAI:
        """The official client, pointed at this server."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=300)

    @property
    def async_client(self) -> openai.AsyncOpenAI:
        """The official asynchronous client, pointed at this server."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=300)

    @property
    def headers(self) -> dict[str, str]:
        """With the key."""
        return {"Authorization": f"Bearer {self.key}"}

    def get(self, path: str) -> httpx.Response:
        """GETs."""
        return httpx.get(f"{self.url}{path}", headers=self.headers, timeout=60)

    def post(self, path: str, body: Any) -> httpx.Response:
        """POSTs JSON."""
        return httpx.post(f"{self.url}{path}", json=body, headers=self.headers, timeout=300)

    def complete(self, prompt: Any, guidance: Any = None, **fields: Any) -> dict[str, Any]:
        """A completion's body; fails on any status but 200."""
        body = {"model": "base", "prompt": prompt, **fields}
        if guidance is not None:
            body["guidance"] = guidance
        response = self.post("/v1/completions", body)
        assert response.status_code == 200, response.text
        return response.json()

    def blocks_in_use(self) -> dict[str, int]:
        """Cache blocks that running requests hold, by reward model."""
        models = self.get("/v1/guidance").json()["reward_models"]
        return {m["name"]: m["cache_blocks_in_use"] for m in models if m["cache_blocks_in_use"] is not None}

    def __enter__(self) -> Self:
        self.process = self._start()
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        return start_process(["serve", *self.flags, "--port", str(self.port)], self.log, self.environment)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise RuntimeError(f"the server did not start; the end of its log:\n{self.log.read_text()[-4000:]}")


def start_process(arguments: Sequence[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Runs the `steersman` command with its output in a file."""
    with log.open("wb") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", "steersman.cli", *arguments], stdout=sink, stderr=sink, env=environment
        )


def test_environment() -> dict[str, str]:
    """One thread, a small cache, no look-ups outside this machine."""
    return {
        **os.environ,
        **SMALL,
        # TRL, once imported by another test, silences vLLM's log in the environment.
        "VLLM_CONFIGURE_LOGGING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }


test_environment.__test__ = False  # type: ignore[attr-defined]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
