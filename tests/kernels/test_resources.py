"""Every launch of production compiled for GPUs that need not be there, and held to the committed table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from steersman.kernels.production import production_launches

ROOT = Path(__file__).parents[2]
TABLE = json.loads((ROOT / "kernels" / "resources.json").read_text())
RELEASES = ("3.9.0", "3.6.0")
"""Of Triton: what vLLM 0.32 brings, and what torch 2.11 does."""
STREAMS = ("topk scan", "head scan", "head rerank", "blend stream", "blend write", "head project", "attention, ")
"""Kernels whose time is that of their loads."""

Found = dict[str, dict[str, int]]
"""Launch → resources."""


def _compile(release: str, capability: int, *flags: str) -> Found:
    command = [sys.executable, "-m", "steersman.kernels.resources", "--capability", str(capability), *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_paths(release))}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    [(target, found)] = json.loads(run.stdout).items()
    assert target == _target(release, capability)
    return found


def _paths(release: str) -> list[str]:
    """Where the project and a release of Triton are imported from."""
    if triton.__version__ == release:
        return [str(ROOT / "src")]
    folder = ROOT / ".venv" / "triton" / release
    if not folder.exists() and torch.cuda.is_available():
        pytest.skip(f"a machine with a GPU compiles with its own release of Triton, not with {release}")
    assert folder.exists(), f"{folder} is missing: make {folder.relative_to(ROOT)}"
    return [str(folder), str(ROOT / "src")]


def _target(release: str, capability: int) -> str:
    return f"triton {release}, sm_{capability}"


def _assert_no_worse(target: str, found: Found) -> None:
    for name, own in found.items():
        allowed = TABLE[target][name]
        for resource in ("registers", "stack_bytes", "shared_bytes", "spills"):
            assert own[resource] <= allowed[resource], (target, name, resource)
        assert own["widest_load_bits"] >= allowed["widest_load_bits"], (target, name)


@pytest.mark.parametrize("release", RELEASES)
def test_on_hopper_nothing_spills_and_streams_load_sixteen_bytes_at_once(release: str) -> None:
    found, target = _compile(release, 90), _target(release, 90)
    assert found.keys() == TABLE[target].keys(), "the table is stale: python -m steersman.kernels.resources --write"
    for name, own in found.items():
        assert own["spills"] == own["stack_bytes"] == 0, name
        assert own["widest_load_bits"] == 128 or not name.startswith(STREAMS), name
    _assert_no_worse(target, found)


@pytest.mark.parametrize("capability", [80, 100])
def test_kernels_compile_for_ampere_and_blackwell_no_worse_than_committed(capability: int) -> None:
    found, target = _compile(RELEASES[0], capability, "--one-each"), _target(RELEASES[0], capability)
    assert len(found) == 13
    _assert_no_worse(target, found)
    assert all(own["spills"] == own["stack_bytes"] == 0 for own in TABLE[target].values())


@pytest.mark.parametrize("release", RELEASES)
def test_every_tile_of_attention_before_hopper_compiles(release: str) -> None:
    found = _compile(release, 80, "--only", "attention, ")
    assert {name for name in production_launches() if name.startswith("attention, ")} == found.keys()
    _assert_no_worse(_target(release, 80), found)
