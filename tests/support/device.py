"""What a GPU does with work that is handed to it, acted out on a CPU: graphs that replay the same memory, a second
stream that runs as late as it may, results that arrive late, and a host that must not ask for values.

Torch's operations are seen by a dispatch mode, Triton's kernels where they are launched.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from steersman.guidance import transfer
from steersman.guidance.graphs import Captured
from steersman.kernels.launch import Launch

_READS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "nonzero")


class Recording(TorchDispatchMode):
    """Runs operations as usual and remembers them with their operands, to be run again on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Tensors that were changed in place, and what they held."""
        self.fresh: list[torch.Tensor] = []
        """Tensors that came into being."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func._schema.is_mutable:
            self.before += [(t, t.clone()) for t in inputs]
            result = func(*args, **kwargs)
            self.calls.append(lambda: func(*args, **kwargs))
            return result
        result = func(*args, **kwargs)
        memory = {t.untyped_storage().data_ptr() for t in inputs}
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if all(t.untyped_storage().data_ptr() in memory for t in outputs):
            return result  # A view shows what is there when it is looked at.
        self.fresh += outputs

        def again() -> None:
            for old, new in zip(outputs, tree_leaves(func(*args, **kwargs)), strict=True):
                old.copy_(new)

        if "empty" not in func.__name__:
            self.calls.append(again)
        return result

    def launch(self, launch: Launch, run: Callable[[Launch], None]) -> None:
        """One kernel."""
        with _disable_current_modes():
            self.before += [(t, t.clone()) for t in launch.arguments.values() if isinstance(t, torch.Tensor)]
            run(launch)
        self.calls.append(lambda: launch.run())

    def replay(self) -> None:
        """Runs everything again, in order."""
        with torch.inference_mode():
            for call in self.calls:
                call()

    def undo(self) -> None:
        """As if nothing had run yet: what was changed is as before, what came into being holds nothing of use."""
        for tensor, held in reversed(self.before):
            tensor.copy_(held)
        for tensor in self.fresh:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)


@contextmanager
def recording() -> Iterator[Recording]:
    """Remembers what runs inside."""
    run = Launch.run
    with pytest.MonkeyPatch.context() as patch, Recording() as mode:
        patch.setattr(Launch, "run", lambda launch: mode.launch(launch, run))
        yield mode


def capture_by_recording(work: Callable[[], torch.Tensor]) -> Captured:
    """As `graphs.CudaCapture` does; nothing may come from the host while it captures."""
    work()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "to_device", _refuse)
        with recording() as mode:
            output = work()
    return Captured(mode.replay, output)


class LateSide:
    """A second stream on which nothing runs before it is joined."""

    def __init__(self) -> None:
        self._waiting: list[Recording] = []
        self.forks = 0

    @property
    def waiting(self) -> bool:
        """Whether something was forked and not joined."""
        return bool(self._waiting)

    @contextmanager
    def fork(self) -> Iterator[None]:
        """See SideStream.fork. What was begun before an error runs all the same."""
        try:
            with recording() as mode:
                yield
        finally:
            mode.undo()
            self._waiting.append(mode)
            self.forks += 1

    def join(self) -> None:
        """See SideStream.join."""
        for mode in self._waiting:
            mode.replay()
        self._waiting.clear()


class SlowCopy:
    """A copy to the host that has not arrived before `arrive()`, unless somebody waits for it."""

    arrived = False

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.clone()

    def is_there(self) -> bool:
        """See HostCopy.is_there."""
        return SlowCopy.arrived

    def read(self) -> list[Any]:
        """See HostCopy.read."""
        return list(_TOLIST(self._tensor))


class Side(Protocol):
    """A second stream that shows whether it is joined."""

    @property
    def waiting(self) -> bool:
        """Whether something was forked and not joined."""
        ...


def copy_when_joined(side: Side) -> Callable[[torch.Tensor], SlowCopy]:
    """Slow copies that are looked at only when nothing that was forked is still waiting: what is done with their
    values may change what a model on the second stream still reads."""

    class JoinedCopy(SlowCopy):
        def __init__(self, tensor: torch.Tensor) -> None:
            assert not side.waiting, "a value is copied before the second stream is joined"
            super().__init__(tensor)

        def is_there(self) -> bool:
            """See HostCopy.is_there."""
            assert not side.waiting, "values are used before the second stream is joined"
            return super().is_there()

        def read(self) -> list[Any]:
            """See HostCopy.read."""
            assert not side.waiting, "values are used before the second stream is joined"
            return super().read()

    return JoinedCopy


_TOLIST = torch.Tensor.tolist


class _NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        masks = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor) and t.dtype == torch.bool]
        if name.startswith(("_local_scalar_dense", "nonzero", "masked_select")) or (
            name.startswith("index.") and masks
        ):
            raise AssertionError(f"the host asks the device: {name}")
        return func(*args, **(kwargs or {}))


@contextmanager
def forbid_host_reads() -> Iterator[None]:
    """Fails whatever would make the host wait for a GPU. Where there is one, torch itself watches."""
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        except RuntimeError as error:
            if "synchronizing" in str(error):
                raise AssertionError(f"the host asks the device for values: {error}") from error
            raise
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    run = Launch.run
    with pytest.MonkeyPatch.context() as patch:
        for name in _READS:
            patch.setattr(torch.Tensor, name, _refuse)

        def launch(self: Launch) -> None:
            # The interpreter works on the host, which is nobody's fault.
            with _disable_current_modes(), pytest.MonkeyPatch.context() as inner:
                for name in _READS:
                    inner.setattr(torch.Tensor, name, _ORIGINALS[name])
                run(self)

        patch.setattr(Launch, "run", launch)
        patch.setattr(torch, "tensor", _tensor_of_transfer)
        with _NoReads():
            yield


_TENSOR = torch.tensor


def _tensor_of_transfer(*arguments: Any, **options: Any) -> torch.Tensor:
    """Only `to_device` hands numbers to a GPU without waiting for it."""
    assert sys._getframe(1).f_globals["__name__"] == transfer.__name__, "numbers go to the device by to_device()"
    return _TENSOR(*arguments, **options)


_ORIGINALS = {name: getattr(torch.Tensor, name) for name in _READS}


def _refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("the host asks the device for values, or hands it some, where it must not")
