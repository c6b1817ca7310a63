"""Rows of speculative decoding in Model Runner V2: a request has one for each drafted token, and one more.

Each row is guided by the text with the drafted tokens in front of it, so that vLLM's rejection sampler compares drafts
with the guided distribution. How many tokens were accepted before, and so which position a row stands for, only the
device knows when a step is prepared; the host learns it a step late.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcRequestState

from steersman.guidance.plan import Plan
from steersman.guidance.rows import GuidedRequest, Row
from steersman.guidance.runtime import GuidanceRuntime
from steersman.guidance.transfer import take_rows, to_device


class GuidedSlot(Protocol):
    """A slot of the runner that holds a guided request."""

    index: int
    request: GuidedRequest


@dataclass(frozen=True)
class _Draft:
    """The guided rows of a step, until it is known which tokens were accepted."""

    slots: list[GuidedSlot]
    """The slot of each row."""
    rows: list[Row]
    lengths: torch.Tensor
    """[rows] int64: tokens in front of what each row predicts."""


class Drafts:
    """Follows the rows of guided requests from step to step."""

    def __init__(self, runtime: GuidanceRuntime, states: LogitsProcRequestState) -> None:
        self._runtime = runtime
        self._states = states
        self._last: _Draft | None = None

    def begin(self, guided: Sequence[tuple[int, GuidedSlot]], batch: Any) -> tuple[list[Row], torch.Tensor]:
        """The rows of a step, and how many tokens of its request's answer are in front of each: [rows] int64, on the
        device.

        guided: the slots of guided requests, each with its place in the batch.
        """
        ends = batch.cu_num_logits_np
        placed = [(row, slot) for place, slot in guided for row in range(int(ends[place]), int(ends[place + 1]))]
        slots = [slot for _, slot in placed]
        rows = [Row(row, slot.request, (), ()) for row, slot in placed]
        lengths = 1 + take_rows(batch.positions[batch.logits_indices], [row.index for row in rows]).long()
        positions = lengths - to_device([slot.request.prompt_length for slot in slots], lengths.device)
        if any(_needs_position(slot.request.plan) for _, slot in guided):
            for row, position in zip(rows, positions.tolist(), strict=True):
                row.draft_position = position
        self._last = _Draft(slots, rows, lengths)
        return rows, positions

    def complete(self, slots: Mapping[int, GuidedSlot]) -> None:
        """Hands the runtime the tokens that were chosen behind the rows of the last step, where the slots, by their
        numbers, hold the same requests still. Of a request that has left its slot the host knows the tokens when it is
        reported on."""
        last, self._last = self._last, None
        if last is None:
            return
        kept = [n for n, slot in enumerate(last.slots) if slots.get(slot.index) is slot]
        if kept:
            tokens = self._states.all_token_ids.gpu
            # Behind a row whose token was rejected the text may end.
            behind = take_rows(last.lengths, kept).clamp(max=tokens.shape[1] - 1)
            chosen = tokens[to_device([last.slots[n].index for n in kept], behind.device), behind].long()
            self._runtime.choose_draft_tokens([last.rows[n] for n in kept], chosen)


def _needs_position(plan: Plan) -> bool:
    """Whether the host has to know a row's position before the step: it waits for the device then."""
    return plan.gate.first_tokens is not None or (plan.gate.kl is not None and plan.gate.kl.samples > 0)
