"""One auxiliary forward as a CUDA graph: captured for a few sizes, replayed for every batch that fits one of them.

A step of a small model is hundreds of short launches; a graph is one. Everything that changes between steps lies in
buffers of fixed shape, and rows beyond the batch have length -1: they attend to themselves and write nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

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


def capture_on_cuda(pool: tuple[int, int]) -> Capture:
    """Captures into a memory pool that the graphs of one model share: their outputs are copied before another runs."""

    def capture(work: Callable[[], torch.Tensor]) -> Captured:
        # Kernels are compiled, and libraries initialised, outside of the capture, which allows neither.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # A server's other threads ask the device of their own work meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = work()
        return Captured(graph.replay, output)

    return capture


def _smallest(sizes: Iterable[int], wanted: int) -> int | None:
    return min((size for size in sizes if size >= wanted), default=None)
