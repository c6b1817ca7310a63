"""What a launch compiles to on a GPU that need not be there: registers, spills, stack, width of loads.

`python -m steersman.kernels.resources --write` compiles every launch of production and brings `resources.json` up to
date for the installed Triton; without the flag it prints what it found.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from steersman.kernels.launch import Launch, planning_for
from steersman.kernels.production import production_launches

TABLE = Path(__file__).parent / "resources.json"
"""What was found last: {"triton 3.9.0, sm_90": {launch: resources}}."""
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one compiled kernel."""

    registers: int
    """A thread's."""
    stack_bytes: int
    """A thread's local memory."""
    shared_bytes: int
    """A program's."""
    spills: int
    """Loads and stores of local memory in the code."""
    widest_load_bits: int
    """That one thread loads from global memory with an instruction."""


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compiles what `launch` would launch, for a GPU of this compute capability (90: Hopper).

    Pointers are taken to be aligned as torch's allocator aligns them; numbers are specialised as at a real launch.
    """
    constants: dict[str, Any] = dict(launch.choices)
    signature: dict[str, str] = dict.fromkeys(constants, "constexpr")
    attributes: dict[tuple[int, ...], list[Any]] = {}
    for name, value in launch.arguments.items():
        place = (launch.kernel.arg_names.index(name),)
        generic = name in launch.kernel.do_not_specialize
        if value is None or (isinstance(value, int) and value == 1 and not generic):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[place] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not generic:
                attributes[place] = [["tt.divisibility", 16]]
    ordered = {name: signature[name] for name in launch.kernel.arg_names}
    compiled = triton.compile(
        ASTSource(launch.kernel, ordered, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=launch.options,
    )
    return _read_binary(compiled.asm["cubin"], compiled.metadata.shared)


def compile_all(capability: int, processes: int = 1, one_each: bool = False, only: str = "") -> dict[str, Resources]:
    """Every launch of production by name, or only one of each kernel, or only those whose name contains `only`."""
    launches = {name: launch for name, launch in production_launches().items() if only in name}
    names = list({launch.kernel: name for name, launch in launches.items()}.values()) if one_each else list(launches)
    with ProcessPoolExecutor(processes) as pool:
        return dict(zip(names, pool.map(partial(_compile_named, capability), names), strict=True))


def _compile_named(capability: int, name: str) -> Resources:
    with planning_for(capability):
        launch = production_launches()[name]
    return compile_launch(launch, capability)


def _read_binary(binary: bytes, shared_bytes: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", file.name)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    loads = {int(bits) for bits in re.findall(r"\b(?:LDG|LDGSTS)\.E\S*?\.(64|128)\b", code)} | {32}
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], shared_bytes, spills, max(loads))


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def main(argv: Sequence[str]) -> int:
    """Prints {"triton 3.9.0, sm_90": {name: resources}}, or writes it into the table."""
    parser = argparse.ArgumentParser(prog="python -m steersman.kernels.resources", description=__doc__)
    parser.add_argument("--capability", type=int, default=90, help="Compute capability, 90 for Hopper.")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--one-each", action="store_true", help="Only one launch of each kernel.")
    parser.add_argument("--only", default="", help="Only launches whose name contains this.")
    parser.add_argument("--write", action="store_true", help=f"Write into {TABLE.name}.")
    args = parser.parse_args(list(argv))
    found = compile_all(args.capability, args.processes, args.one_each, args.only)
    entry = {f"triton {triton.__version__}, sm_{args.capability}": {name: asdict(r) for name, r in found.items()}}
    if args.write:
        TABLE.write_text(json.dumps(dict(sorted({**json.loads(TABLE.read_text()), **entry}.items())), indent=1) + "\n")
    else:
        json.dump(entry, sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
