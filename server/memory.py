"""Whether a model that is loaded beside a running server fits into the memory that is left."""

import math
from pathlib import Path

import torch
from safetensors import safe_open

from steersman.guidance.checkpoints import ModelRefused

HEADROOM = 2**29
"""Bytes that stay free for what forwards need beside weights and caches."""

_CGROUP = Path("/sys/fs/cgroup")
_GIB = 2**30


def require_room(label: str, device: torch.device, weights: int, cache: int, *, read: bool) -> None:
    """Raises ModelRefused where a model's weights and cache, in bytes, do not fit.

    read: whether the weights lie in the host's memory already. On the way there they lie in it twice.
    """
    host = torch.device("cpu")
    needs = {device: weights + cache}
    if not read:
        needs[host] = 2 * weights + needs.get(host, weights) - weights
    for place, needed in needs.items():
        free = free_memory(place)
        if needed + HEADROOM > free:
            raise ModelRefused(
                f"{label} takes {(needed + HEADROOM) / _GIB:.2f} GiB of {_name(place)} on its way "
                f"(weights {weights / _GIB:.2f}, cache {cache / _GIB:.2f}), of which {free / _GIB:.2f} are free; "
                "unload a model, ask for less by cache_gib, or start the server with a smaller --gpu-memory-utilization"
            )


def require_cache_room(cache_gib: float, device: torch.device) -> None:
    """Raises ModelRefused where the caches of the models configured at start do not fit into what is free."""
    free = free_memory(device)
    if cache_gib * _GIB + HEADROOM > free:
        most = max(0, free - HEADROOM) / _GIB
        raise ModelRefused(
            f"--guidance-cache {cache_gib:g}: {free / _GIB:.2f} GiB of {_name(device)} are free, of which "
            f"{HEADROOM / _GIB:g} are kept for forwards; give less than {most:.2f}, or free memory for it"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still get."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return free
    # Files that were read a while ago are let go when memory is short.
    return free if limit == "max" else min(free, int(limit) - used + int(statistics["inactive_file"]))


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """What a checkpoint's weights take in this precision; reads the files' headers only."""
    numbers = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            numbers += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return numbers * dtype.itemsize


def _name(device: torch.device) -> str:
    return "the host's memory" if device.type == "cpu" else f"the memory of {device}"
