"""The arrows between the folders run one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "kernels": {"kernels"},
    "guidance": {"guidance", "kernels"},
    "server": {"server", "guidance", "kernels", "processes"},
    "training": {"training", "guidance", "kernels", "processes"},
    "clients": {"clients", "guidance.request"},
}

VLLM_ENTRY_POINTS = ("vllm.entrypoints", "vllm.engine")


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_lies_below_it(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        for name in _imports(path):
            if name.startswith("steersman."):
                target = name.removeprefix("steersman.")
                assert any(target == t or target.startswith(f"{t}.") for t in MAY_IMPORT[room]), (
                    f"{path} imports {name}"
                )


def test_vllms_entry_points_are_imported_in_one_module() -> None:
    for room in (*MAY_IMPORT, "benchmarks", "src"):
        for path in (ROOT / room).rglob("*.py"):
            if path.relative_to(ROOT) != Path("server/vllm.py"):
                found = [name for name in _imports(path) if name.startswith(VLLM_ENTRY_POINTS)]
                assert not found, f"{path} imports {found}"


def test_the_guidance_runtime_knows_neither_vllm_nor_http() -> None:
    for path in (ROOT / "guidance").rglob("*.py"):
        assert not {n.split(".")[0] for n in _imports(path)} & {"vllm", "fastapi", "httpx", "openai"}, path
