"""One auxiliary forward as a CUDA graph: captured for a few sizes, replayed for every batch that fits one of them.

A step of a small model is hundreds of short launches; a graph is one. Everything that changes between steps lies in
buffers of fixed shape, and rows beyond the batch have length -1: they attend to themselves and write nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from steersman.guidance.streams import hold_stream

MOST_ROWS = 64
"""Above it the forward's own work hides its launches."""
CANDIDATES = (10, 20, 40, 64)
"""Numbers of candidates that are captured for; fewer are filled up."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A sequence of launches over memory that stays where it is."""

    replay: Callable[[], None]
    output: torch.Tensor
    """Written by every replay."""


Capture = Callable[[Callable[[], torch.Tensor]], Captured]
Forward = Callable[["StepInputs", int], torch.Tensor]
"""Inputs of G rows and k → outputs [G, k or 1, C]."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What changes between steps, in memory that stays where it is."""

    tokens: torch.Tensor
    """[G, T] int64."""
    tables: torch.Tensor
    """[G, W] int64."""
    lengths: torch.Tensor
    """[G] int32: tokens cached before the last one; -1 for a row that is not there."""

    def first(self, rows: int) -> "StepInputs":
        """Those of the first rows."""
        return StepInputs(self.tokens[:rows], self.tables[:rows], self.lengths[:rows])


class StepGraphs:
    """The graphs of one model, by candidates and rows. They share their inputs' memory."""

    def __init__(self) -> None:
        self._graphs: dict[int, dict[int, Captured]] = {}
        self._inputs: dict[int, StepInputs] = {}

    def allocate(self, candidates: Iterable[int], width: int, device: torch.device) -> None:
        """Memory of the inputs. width: blocks of the longest table."""
        tables = torch.zeros(MOST_ROWS, width, dtype=torch.long, device=device)
        lengths = torch.full((MOST_ROWS,), -1, dtype=torch.int32, device=device)
        for k in candidates:
            tokens = torch.zeros(MOST_ROWS, 1 + k, dtype=torch.long, device=device)
            self._inputs[k] = StepInputs(tokens, tables, lengths)

    def inputs(self, rows: int, k: int) -> StepInputs:
        """What a graph for `rows` and `k` candidates reads."""
        return self._inputs[k].first(rows)

    def capture(self, sizes: Iterable[tuple[int, int]], forward: Forward, capture: Capture) -> Iterator[None]:
        """One graph a turn. sizes: (rows, candidates), the largest first so that the smaller share its memory."""
        for rows, k in sizes:
            inputs = self.inputs(rows, k)
            self._graphs.setdefault(k, {})[rows] = capture(lambda inputs=inputs, k=k: forward(inputs, k))  # type: ignore[misc]
            yield

    def run(self, step: StepInputs) -> torch.Tensor | None:
        """One forward of [last token | k candidates]; k = 0 where the last token is alone.

        Returns outputs [G, k or 1, C] float32 in memory of their own, or None where no graph has room for the step.
        """
        rows, fed = step.tokens.shape
        k = _smallest(self._graphs, fed - 1) if fed > 1 else 0
        room = None if k is None else _smallest(self._graphs.get(k, ()), rows)
        if k is None or room is None:
            return None
        inputs = self._inputs[k]
        inputs.tokens[:rows, :fed].copy_(step.tokens)
        inputs.tables[:rows, : step.tables.shape[1]].copy_(step.tables)
        inputs.lengths[:rows].copy_(step.lengths)
        inputs.lengths[rows:room].fill_(-1)
        captured = self._graphs[k][room]
        captured.replay()
        return captured.output[:rows, : max(fed - 1, 1)].to(torch.float32, copy=True)


def choose_sizes(most_rows: int, candidates: Sequence[int]) -> list[tuple[int, int]]:
    """Rows in powers of two up to what a batch may hold, for each number of candidates; the largest first."""
    most = min(most_rows, MOST_ROWS)
    rows = [1 << n for n in range((most - 1).bit_length() + 1)]
    return [(r, k) for k in sorted(candidates, reverse=True) for r in reversed(rows)]


class CudaCapture:
    """Captures the graphs of one model on a stream of its own, and into a memory pool that they share: the outputs of
    one are copied before another runs."""

    def __init__(self, device: torch.device) -> None:
        self._held = hold_stream(device)
        self._stream = self._held.stream
        self._device = self._stream.device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], torch.Tensor]) -> Captured:
        """Runs `work` once and captures it. Raises the first error of one that fails, and leaves torch as it was."""
        self._warm_up(work)
        # As torch.cuda.graph does: the graphs' pool cannot use what other pools keep.
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        # torch.cuda.graph stays on its stream where beginning or ending the capture fails.
        with torch.cuda.stream(self._stream), _spare_generator(self._device):
            return self._capture(work)

    def _warm_up(self, work: Callable[[], torch.Tensor]) -> None:
        """Kernels are compiled and libraries initialised outside of the capture, which allows neither."""
        before = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(before)
        try:
            with torch.cuda.stream(self._stream):
                work()
        finally:
            before.wait_stream(self._stream)

    def _capture(self, work: Callable[[], torch.Tensor]) -> Captured:
        graph = torch.cuda.CUDAGraph()
        try:
            # The server's other threads may do what this one may not.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            output = work()
            graph.capture_end()
        except BaseException:
            self._abandon(graph)
            raise
        return Captured(graph.replay, output)

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends a capture that failed. What these calls raise depends on how far it had come; the first error counts."""
        with suppress(RuntimeError):
            graph.capture_end()
        # An end that fails leaves the allocator recording, and the pool in use for good. Both calls are torch's own.
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
            torch._C._cuda_releasePool(self._device.index, self._pool)


@contextmanager
def _spare_generator(device: torch.device) -> Iterator[None]:
    """Captures register a copy of the device's generator: after a failed one the registered generator cannot draw."""
    generator = torch.cuda.default_generators[device.index]
    own = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(own)


def _smallest(sizes: Iterable[int], wanted: int) -> int | None:
    return min((size for size in sizes if size >= wanted), default=None)
