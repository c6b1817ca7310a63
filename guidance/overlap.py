"""Work beside the base model's forward: a second stream, forked before it and joined before its logits are guided."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

from steersman.guidance.streams import hold_stream


class SideStream(Protocol):
    """A stream of its own for what does not need the base's logits."""

    def fork(self) -> AbstractContextManager[None]:
        """Work begun inside runs behind all that came before, and beside what comes after."""
        ...

    def join(self) -> None:
        """What comes after runs behind all work that was forked."""
        ...


class CudaSideStream:
    """A CUDA stream of its own.

    Memory that is allocated on it and used on the main stream needs no mark of its use: the next fork, behind which it
    could be handed out again, waits for the main stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._held = hold_stream(device)
        self._stream = self._held.stream
        self._forked = False

    @contextmanager
    def fork(self) -> Iterator[None]:
        """See SideStream.fork."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._forked = True
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """See SideStream.join."""
        if self._forked:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._forked = False


class SameStream:
    """For a device without streams: work is done where it is begun."""

    @contextmanager
    def fork(self) -> Iterator[None]:
        """See SideStream.fork."""
        yield

    def join(self) -> None:
        """Nothing is left to wait for."""


def make_side_stream(device: torch.device) -> SideStream:
    """The device's own."""
    return CudaSideStream(device) if device.type == "cuda" else SameStream()
