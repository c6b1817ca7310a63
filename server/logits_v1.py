"""Adapter for vLLM's V1 logits processors: keyed by batch row, told of rows added, moved and removed."""

from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from steersman.guidance.rows import Row
from steersman.server.loading import build_runtime, read_attached
from steersman.server.partial_prefill import PartialRows


class GuidanceLogitsProcessor(LogitsProcessor):
    """Guides the rows whose requests ask for it; a batch without such rows costs one dictionary lookup."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.runtime = build_runtime(vllm_config, device)
        self.partial_rows: PartialRows | None = None
        self._rows: dict[int, Row] = {}

    def is_argmax_invariant(self) -> bool:
        """Guidance changes which token is the most likely."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows the batch. vLLM does not list a row as removed when another takes its place at once."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._drop(index)
        for index, params, prompt, output in batch_update.added:
            self._drop(index)
            attached = read_attached(params)
            if attached is not None:
                request = self.runtime.start(attached.key, attached.plan, len(prompt or ()), attached.seed)
                self._rows[index] = Row(index, request, prompt or [], output)
        for source, target, direction in batch_update.moved:
            self._move(source, target, direction is MoveDirectionality.SWAP)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Guides in place: [rows, V] float32. Rows whose prompt is not read to its end are left alone."""
        if self._rows:
            rows = list(self._rows.values())
            if self.partial_rows is not None and (partial := self.partial_rows()[: len(logits)]).any():
                rows = [row for row in rows if not partial[row.index]]
            if rows:
                self.runtime.step(logits, rows)
        return logits

    def _drop(self, index: int) -> None:
        row = self._rows.pop(index, None)
        if row is not None:
            self.runtime.pause(row.request.key, [*row.prompt, *row.output])

    def _move(self, source: int, target: int, swap: bool) -> None:
        moved, displaced = self._rows.pop(source, None), self._rows.get(target)
        if swap:
            self._rows.pop(target, None)
            self._place(displaced, source)
        else:
            self._drop(target)
        self._place(moved, target)

    def _place(self, row: Row | None, index: int) -> None:
        if row is not None:
            row.index = index
            self._rows[index] = row
