"""CUDA streams that have one holder each.

torch.cuda.Stream() returns the next of 32 streams that a device has for each priority: the 33rd object is the first
one's stream again. Models must not share a stream, because cuBLAS keeps a workspace for each stream and captured graphs
write to it. A stream that was given back is lent again before another is drawn: a server that loads and unloads models
for months draws few, which leaves the others to vLLM, and no new workspaces.
"""

import weakref
from collections import deque
from collections.abc import Iterator
from threading import Lock

import torch

_DRAWS = 64
"""Twice as many as torch has to draw from: other threads draw meanwhile."""


class StreamsExhausted(RuntimeError):
    """Every stream of a device has a holder."""


class HeldStream:
    """A stream that is lent to nobody else while this object lives."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream


class StreamPool:
    """The streams of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = Lock()
        self._held: weakref.WeakValueDictionary[int, HeldStream] = weakref.WeakValueDictionary()
        """By the CUDA handle: two of torch's objects may be one stream."""
        self._given_back: deque[torch.cuda.Stream] = deque()

    def find(self, stream: torch.cuda.Stream) -> HeldStream | None:
        """What its holder holds, or None for a stream that is not lent."""
        return self._held.get(stream.cuda_stream)

    def lend(self) -> HeldStream:
        """A stream without another holder, which is neither the current one nor the one that torch captures on by
        default; raises StreamsExhausted."""
        known = (torch.cuda.current_stream(self._device), torch.cuda.graph.default_capture_stream)
        others = {stream.cuda_stream for stream in known if stream is not None}
        with self._lock:
            for stream in self._candidates():
                if stream.cuda_stream not in self._held and stream.cuda_stream not in others:
                    held = self._held[stream.cuda_stream] = HeldStream(stream)
                    # Called by whichever thread drops the last reference, at any time: it must not take the lock.
                    weakref.finalize(held, self._given_back.append, stream).atexit = False
                    return held
        raise StreamsExhausted(f"{len(self._held)} CUDA streams are in use and none is left: unload a model")

    def _candidates(self) -> Iterator[torch.cuda.Stream]:
        while self._given_back:
            yield self._given_back.popleft()
        for _ in range(_DRAWS):
            yield torch.cuda.Stream(self._device)


_pools: dict[torch.device, StreamPool] = {}


def hold_stream(device: torch.device) -> HeldStream:
    """The current stream where it is a lent one, so that what is built on a stream keeps it; else a stream without
    another holder. Raises StreamsExhausted."""
    current = torch.cuda.current_stream(device)
    pool = _pools.setdefault(current.device, StreamPool(current.device))
    return pool.find(current) or pool.lend()
