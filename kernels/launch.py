"""How a kernel is launched: grid, arguments and compile-time choices as data, so that what runs is what is checked."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

_PROGRAMS = 264
"""Programs that fill a large GPU: twice the streaming multiprocessors of an H100 or H200."""
_HOPPER = 90
_planned: ContextVar[int | None] = ContextVar("planned", default=None)


def is_small() -> bool:
    """Whether launches are planned for a GPU before Hopper, on which large tiles spill."""
    planned = _planned.get()
    return (_own_capability() if planned is None else planned) < _HOPPER


@cache
def _own_capability() -> int:
    """Of the GPU at hand, asked once: every launch is planned by it. Without one, Hopper's."""
    if not torch.cuda.is_available():
        return _HOPPER
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@contextmanager
def planning_for(capability: int) -> Iterator[None]:
    """Plans launches for a GPU of this compute capability, 80 for Ampere, whatever is there."""
    token = _planned.set(capability)
    try:
        yield
    finally:
        _planned.reset(token)


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    """Tensors and numbers, by the kernel's own names."""
    choices: Mapping[str, Any]
    """Compile-time constants."""
    warps: int
    stages: int = 3
    registers: int | None = None
    """A thread's at most. Without a bound the compiler chooses one, at which it may spill a few."""

    @property
    def options(self) -> dict[str, int]:
        """As Triton's compiler takes them."""
        bound = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **bound}

    def run(self) -> None:
        """Launches it on the current stream."""
        self.kernel[self.grid](**self.arguments, **self.choices, **self.options)

    def compile(self) -> None:
        """Compiles it for the current GPU without launching it; tensors may be without memory (device "meta").

        Later launches of the same `variant` find the compiled kernel.
        """
        self.kernel.warmup(**self.arguments, **self.choices, **self.options, grid=self.grid)

    @property
    def variant(self) -> tuple[Any, ...]:
        """What Triton compiles one kernel for: launches with equal variants share it.

        Besides the compile-time constants these are the arguments' types, and of pointers and integers whether they are
        multiples of 16, of integers also whether they are 1, where the kernel does not exclude them from it.
        """
        generic = _unspecialised(self.kernel)
        kinds = tuple((name, _specialise(value, name in generic)) for name, value in self.arguments.items())
        return (self.kernel.fn.__name__, *sorted(self.choices.items()), *kinds, *self.options.items())


def _unspecialised(kernel: Any) -> Sequence[str]:
    """Names of the integers that make no variants; Triton's interpreter keeps them elsewhere than its compiler."""
    return getattr(kernel, "do_not_specialize", None) or getattr(kernel, "kwargs", {}).get("do_not_specialize") or ()


def _specialise(value: Any, generic: bool) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        wide = not -(2**31) <= value < 2**31
        return ("int", wide) if generic else ("int", wide, value == 1, value % 16 == 0)
    return type(value).__name__


@dataclass(frozen=True, slots=True)
class Split:
    """How the tiles of one row are shared out."""

    splits: int
    tiles_each: int


def split_rows(rows: int, tiles: int) -> Split:
    """Enough programs for the whole GPU where there are few rows, each with whole tiles."""
    wanted = min(tiles, max(1, _PROGRAMS // rows))
    each = triton.cdiv(tiles, wanted)
    return Split(triton.cdiv(tiles, each), each)


def most_splits(tiles: int) -> int:
    """Splits of a row at any number of rows: a single one is split most."""
    return split_rows(1, tiles).splits


def require_contiguous(**tensors: torch.Tensor | None) -> None:
    """Raises ValueError for a tensor that a kernel would read in the wrong order."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name}: strides {tensor.stride()} of shape {tuple(tensor.shape)}; make it contiguous")


def require_rows(**tensors: torch.Tensor) -> None:
    """Raises ValueError for a matrix whose rows are not contiguous; there may be room between them."""
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: the stride of a row's entries is {tensor.stride(-1)}; make rows contiguous")
