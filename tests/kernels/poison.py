"""Memory whose old contents would show: what a kernel leaves unwritten must not pass by luck."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

_EMPTY = torch.empty


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN, the largest integer or True in the context."""

    def empty(*size: int, **options: object) -> torch.Tensor:
        tensor = _EMPTY(*size, **options)  # type: ignore[call-overload]
        return tensor.fill_(_poison(tensor.dtype))

    with mock.patch.object(torch, "empty", empty), mock.patch.object(torch, "empty_like", _poisoned_like):
        yield


def _poisoned_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, _poison(tensor.dtype))


def _poison(dtype: torch.dtype) -> float:
    if dtype.is_floating_point:
        return torch.nan
    return True if dtype is torch.bool else torch.iinfo(dtype).max
