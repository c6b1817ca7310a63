"""Every launch of production compiled for GPUs that need not be there, and held to the committed table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = json.loads((ROOT / "kernels" / "resources.json").read_text())
OTHER_TRITON = ROOT / ".venv" / "triton" / "3.6.0"
STREAMS = ("topk scan", "blend stream", "blend write", "attention, ")
"""Kernels whose time is that of their loads."""

Found = dict[str, dict[str, int]]
"""Launch → resources."""


def _compile(*flags: str, triton: Path | None = None) -> tuple[str, Found]:
    environment = {**os.environ, "PYTHONPATH": "" if triton is None else str(triton)}
    command = [sys.executable, "-m", "steersman.kernels.resources", *flags]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    [(target, found)] = json.loads(run.stdout).items()
    return target, found


def _assert_no_worse(target: str, found: Found) -> None:
    for name, own in found.items():
        allowed = TABLE[target][name]
        for resource in ("registers", "stack_bytes", "shared_bytes", "spills"):
            assert own[resource] <= allowed[resource], (target, name, resource)
        assert own["widest_load_bits"] >= allowed["widest_load_bits"], (target, name)


@pytest.mark.parametrize("triton", [None, OTHER_TRITON], ids=["3.9", "3.6"])
def test_on_hopper_nothing_spills_and_streams_load_sixteen_bytes_at_once(triton: Path | None) -> None:
    assert triton is None or triton.exists(), f"{triton} is missing: make {triton and triton.relative_to(ROOT)}"
    target, found = _compile("--capability", "90", triton=triton)
    assert target == f"triton {'3.9.0' if triton is None else triton.name}, sm_90"
    assert found.keys() == TABLE[target].keys(), "the table is stale: python -m steersman.kernels.resources --write"
    for name, own in found.items():
        assert own["spills"] == own["stack_bytes"] == 0, name
        assert own["widest_load_bits"] == 128 or not name.startswith(STREAMS), name
    _assert_no_worse(target, found)


@pytest.mark.parametrize("capability", [80, 100])
def test_kernels_compile_for_ampere_and_blackwell_no_worse_than_committed(capability: int) -> None:
    target, found = _compile("--capability", str(capability), "--one-each")
    assert len(found) == 8
    _assert_no_worse(target, found)
    assert all(own["spills"] == own["stack_bytes"] == 0 for own in TABLE[target].values())
