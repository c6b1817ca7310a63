"""Adapter for Model Runner V2's logits processors: keyed by request slot, rows in any order every step.

Where vLLM shards sampling over tensor-parallel ranks, a rank sees, guides and records its own requests only.
"""

from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from steersman.guidance.rows import GuidedRequest, Row
from steersman.guidance.transfer import to_device
from steersman.server.loading import build_runtime, read_attached

_UNKNOWN = -1
"""Stands for a token that the device has chosen and the host has not been told of."""


@dataclass
class _Slot:
    """A guided request in its slot. Its prompt is read from vLLM's buffer once; its output is followed, and known to
    the host a step late."""

    index: int
    request: GuidedRequest
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)

    def known_tokens(self) -> list[int]:
        """Up to the first that the host does not know."""
        return [*self.prompt, *takewhile(lambda token: token != _UNKNOWN, self.output)]

    def reach(self, length: int) -> None:
        """Makes room for `length` tokens in all and forgets those behind them."""
        outputs = length - len(self.prompt)
        del self.output[outputs:]
        self.output += [_UNKNOWN] * (outputs - len(self.output))


class GuidanceLogitsProcessor(LogitsProcessor):
    """Guides the rows whose slots hold a guided request."""

    def __init__(self, vllm_config: Any, req_states: LogitsProcRequestState) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError("guidance does not work with speculative decoding; start without --speculative-config")
        self.runtime = build_runtime(vllm_config, req_states.device)
        self._states = req_states
        self._slots: dict[int, _Slot] = {}
        self._stepped: list[_Slot] = []
        """Guided in the last step; most of them are in the next one."""

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """The slot's former request has left for good or is preempted: either way its cache is given back."""
        former = self._slots.pop(req_idx, None)
        if former is not None:
            self.runtime.pause(former.request.key, former.known_tokens())
        attached = read_attached(sampling_params)
        if attached is None:
            return False
        prompt_length = int(self._states.prompt_len.np[req_idx])
        request = self.runtime.start(attached.key, attached.plan, prompt_length, attached.seed)
        self._slots = {slot: held for slot, held in self._slots.items() if held.request.key != attached.key}
        self._slots[req_idx] = _Slot(req_idx, request)
        return True

    def apply_staged_writes(self) -> None:
        """Called before the base's forward: what does not depend on its logits is begun beside it, for every request
        that was guided in the last step. The token sampled there is the device's alone yet."""
        held = [slot for slot in self._stepped if self._slots.get(slot.index) is slot]
        self._stepped = []
        rows = []
        for place, slot in enumerate(held):
            slot.reach(len(slot.prompt) + len(slot.output) + 1)
            rows.append(Row(place, slot.request, slot.prompt, slot.output))
        self.runtime.read_ahead(rows, lambda: self._last_tokens([slot.index for slot in held]))

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Guides in place: [rows, V] float32; rows whose prompt is not read to its end are left alone."""
        lengths = ctx.seq_lens_upper_bound_np
        guided = [
            (index, self._slots[slot])
            for index, slot in enumerate(ctx.idx_mapping_np.tolist())
            if slot in self._slots
            and lengths[index] >= self._states.prefill_len.np[slot]
            and not self._slots[slot].request.finished
        ]
        if guided:
            rows = [self._row(index, slot, int(lengths[index])) for index, slot in guided]
            self._learn(guided, ctx.input_ids)
            self.runtime.step(logits, rows, ctx.input_ids.long())
            self._stepped = [slot for _, slot in guided]
        return logits

    def _row(self, index: int, held: _Slot, length: int) -> Row:
        prompt_length = held.request.prompt_length
        if not held.prompt:
            tokens = self._states.all_token_ids.gpu[held.index, : int(self._states.prefill_len.np[held.index])].tolist()
            held.prompt, held.output = tokens[:prompt_length], tokens[prompt_length:]
        held.reach(length)
        return Row(index, held.request, held.prompt, held.output)

    def _learn(self, guided: list[tuple[int, _Slot]], fed: torch.Tensor) -> None:
        """Each row was fed its last token: the prompt's, or the last one that was sampled."""
        places = [(index, held, len(held.output) - 1) for index, held in guided if held.output]

        def use(tokens: list[int]) -> None:
            for index, held, place in places:
                if place < len(held.output):
                    held.output[place] = tokens[index]

        self.runtime.read_late(fed, use)

    def _last_tokens(self, slots: list[int]) -> torch.Tensor:
        index = to_device(slots, self._states.device)
        last = self._states.total_len.gpu[index].long() - 1
        return self._states.all_token_ids.gpu[index, last].long()
