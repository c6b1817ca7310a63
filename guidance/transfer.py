"""Numbers between host and device, without making the host wait for the device."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch


def to_device(values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor of the host's numbers. To a GPU they are copied from pinned memory, when its stream comes to it."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def take_rows(values: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """Rows of `values` [n, ...] in the order of `places`; `values` itself, uncopied, where they are all in order."""
    whole = len(places) == len(values) and all(place == n for n, place in enumerate(places))
    return values if whole else values[to_device(places, values.device)]


class HostCopy(Protocol):
    """A copy to the host that is under way."""

    def is_there(self) -> bool:
        """Whether it can be read without waiting."""
        ...

    def read(self) -> list[Any]:
        """The values, as `Tensor.tolist` gives them; waits for them."""
        ...


class ImmediateCopy:
    """Of a tensor that lies on the host."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def is_there(self) -> bool:
        """Always."""
        return True

    def read(self) -> list[Any]:
        """See HostCopy.read."""
        return list(self._tensor.tolist())


class PinnedCopy:
    """Of a tensor on a GPU, behind everything that is on the current stream."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._copy.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def is_there(self) -> bool:
        """See HostCopy.is_there."""
        return self._event.query()

    def read(self) -> list[Any]:
        """See HostCopy.read."""
        self._event.synchronize()
        return list(self._copy.tolist())


def copy_to_host(tensor: torch.Tensor) -> HostCopy:
    """Begins a copy."""
    return PinnedCopy(tensor) if tensor.device.type == "cuda" else ImmediateCopy(tensor)


class LateReads:
    """Values of device tensors that the host uses when they have arrived, in the order in which they were read: at once
    on a CPU, on a GPU usually at the next step.

    join: orders what comes after behind work on other streams. A callback may fail a row, which scrubs and frees cache
    blocks, so it is called before any: no caller can leave it out.
    """

    def __init__(self, join: Callable[[], None], copy: Callable[[torch.Tensor], HostCopy] = copy_to_host) -> None:
        self._join = join
        self._copy = copy
        self._pending: deque[tuple[HostCopy, Callable[[list[Any]], None]]] = deque()

    def read(self, tensor: torch.Tensor, use: Callable[[list[Any]], None]) -> None:
        """Calls `use` with the tensor's values once they, and all that were read before them, have arrived."""
        self._join()
        self._pending.append((self._copy(tensor), use))
        self.settle()

    def settle(self, wait: bool = False) -> None:
        """Uses the values that have arrived; with `wait` all of them, which may keep the host waiting."""
        self._join()
        while self._pending and (wait or self._pending[0][0].is_there()):
            copy, use = self._pending.popleft()
            use(copy.read())
