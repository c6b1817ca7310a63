"""What torch.cuda does with streams and captures, acted out without a GPU: torch 2.11, its faults included."""

from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda", 0)


class FakeStream:
    """An object for a CUDA stream; `cuda_stream` says which."""

    def __init__(self, cuda: "FakeCuda", handle: int) -> None:
        self._cuda = cuda
        self.cuda_stream = handle
        self.device = DEVICE

    def wait_stream(self, other: "FakeStream") -> None:
        """Remembers the order."""
        self._cuda.waits.append((self.cuda_stream, other.cuda_stream))

    def synchronize(self) -> None:
        """Nothing is under way."""


class FakeGenerator:
    """A generator over a state that captures register: here, the captures that did not end."""

    def __init__(self, state: set[Any]) -> None:
        self.state = state

    def graphsafe_get_state(self) -> "FakeGenerator":
        """One that shares the state."""
        return FakeGenerator(self.state)

    def graphsafe_set_state(self, other: "FakeGenerator") -> None:
        """Shares the other's state."""
        self.state = other.state

    def clone_state(self) -> "FakeGenerator":
        """One with a state of its own."""
        return FakeGenerator(set())


class FakeGraph:
    """A capture that fails where it is told to."""

    def __init__(self, cuda: "FakeCuda") -> None:
        self._cuda = cuda
        self._stream: int | None = None

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
        """Registers generator and allocator before the stream, as torch does."""
        self._cuda.captured_on.append(self._cuda.current.cuda_stream)
        self._cuda.generator.state.add(self)
        self._cuda.recording.append(pool)
        self._cuda.uses[pool] += 1
        self._pool = pool
        if self._cuda.failing == "begin":
            raise RuntimeError("beginning failed")
        self._stream = self._cuda.current.cuda_stream

    def capture_end(self) -> None:
        """A capture that was invalidated ends with an error, before generator and allocator are told."""
        if self._stream != self._cuda.current.cuda_stream:
            raise RuntimeError("the stream is not being captured")
        self._stream = None
        if self._cuda.failing in ("work", "end"):
            raise RuntimeError("ending failed")
        self._cuda.recording.remove(self._pool)
        self._cuda.generator.state.discard(self)

    def replay(self) -> None:
        """Nothing was recorded."""


class StreamContext:
    """Makes a stream current. Like torch's it restores the former one where it is left, and only there."""

    def __init__(self, cuda: "FakeCuda", stream: FakeStream) -> None:
        self._cuda = cuda
        self._stream = stream

    def __enter__(self) -> None:
        """Remembers the current stream."""
        self._before, self._cuda.current = self._cuda.current, self._stream

    def __exit__(self, *_: object) -> None:
        """Goes back to it."""
        self._cuda.current = self._before


class FakeCuda:
    """State of the one device."""

    def __init__(self, streams: int = 32) -> None:
        self._handles = count()
        self._streams = streams
        self.default = FakeStream(self, 0)
        self.current = self.default
        self.waits: list[tuple[int, int]] = []
        self.captured_on: list[int] = []
        self.generator = FakeGenerator(set())
        self.recording: list[tuple[int, int]] = []
        """Pools that the allocator takes memory from."""
        self.uses: Counter[tuple[int, int]] = Counter()
        self.failing = ""
        """"begin", "work" or "end": where captures fail."""
        self.emptied = 0

    def draw(self, device: Any = None) -> FakeStream:
        """Streams come round again."""
        return FakeStream(self, 1 + next(self._handles) % self._streams)

    def stream(self, stream: FakeStream) -> "StreamContext":
        """As torch.cuda.stream."""
        return StreamContext(self, stream)

    def empty_cache(self) -> None:
        """Counts."""
        self.emptied += 1

    def end_allocation(self, device: int, pool: tuple[int, int]) -> None:
        """As the allocator does: an error where it is not recording."""
        if pool not in self.recording:
            raise RuntimeError("not currently recording")
        self.recording.remove(pool)

    def release_pool(self, device: int, pool: tuple[int, int]) -> None:
        """One user fewer."""
        self.uses[pool] -= 1

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Takes torch.cuda's place."""
        pools = count(1)
        functions: dict[str, Callable[..., Any]] = {
            "Stream": self.draw,
            "stream": self.stream,
            "current_stream": lambda device=None: self.current,
            "CUDAGraph": lambda: FakeGraph(self),
            "graph_pool_handle": lambda: (0, next(pools)),
            "synchronize": lambda device=None: None,
            "empty_cache": self.empty_cache,
        }
        for name, function in functions.items():
            patch.setattr(torch.cuda, name, function)
        patch.setattr(torch.cuda, "default_generators", (self.generator,))
        patch.setattr(torch.cuda.graph, "default_capture_stream", None)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocation, raising=False)
        patch.setattr(torch._C, "_cuda_releasePool", self.release_pool, raising=False)
