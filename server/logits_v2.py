"""Adapter for Model Runner V2's logits processors: keyed by request slot, rows in any order every step."""

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from steersman.guidance.rows import GuidedRequest, Row
from steersman.server.loading import build_runtime, read_attached


@dataclass
class _Slot:
    """A guided request in its slot; its tokens are read from vLLM's buffer once, and followed from then on."""

    request: GuidedRequest
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)


class GuidanceLogitsProcessor(LogitsProcessor):
    """Guides the rows whose slots hold a guided request."""

    def __init__(self, vllm_config: Any, req_states: LogitsProcRequestState) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError("guidance does not work with speculative decoding; start without --speculative-config")
        self.runtime = build_runtime(vllm_config, req_states.device)
        self._states = req_states
        self._slots: dict[int, _Slot] = {}

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """The slot's former request has left for good or is preempted: either way its cache is given back."""
        former = self._slots.pop(req_idx, None)
        if former is not None:
            self.runtime.pause(former.request.key, [*former.prompt, *former.output])
        attached = read_attached(sampling_params)
        if attached is None:
            return False
        prompt_length = int(self._states.prompt_len.np[req_idx])
        request = self.runtime.start(attached.key, attached.plan, prompt_length, attached.seed)
        self._slots = {slot: held for slot, held in self._slots.items() if held.request.key != attached.key}
        self._slots[req_idx] = _Slot(request)
        return True

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Guides in place: [rows, V] float32; rows whose prompt is not read to its end are left alone."""
        guided = [
            (index, slot)
            for index, slot in enumerate(ctx.idx_mapping_np.tolist())
            if slot in self._slots
            and ctx.seq_lens_upper_bound_np[index] >= self._states.prefill_len.np[slot]
            and not self._slots[slot].request.finished
        ]
        if guided:
            fed = ctx.input_ids.tolist()
            lengths = (ctx.pos + 1).tolist()
            rows = [self._row(index, slot, fed[index], lengths[index]) for index, slot in guided]
            self.runtime.step(logits, rows)
        return logits

    def _row(self, index: int, slot: int, fed: int, length: int) -> Row:
        """`fed` is the token at position `length` - 1: the last of the prompt, or the last that was generated."""
        held = self._slots[slot]
        prompt_length = held.request.prompt_length
        if not held.prompt:
            tokens = self._states.all_token_ids.gpu[slot, : int(self._states.prefill_len.np[slot])].tolist()
            held.prompt, held.output = tokens[:prompt_length], tokens[prompt_length:]
        if length > prompt_length:
            del held.output[length - 1 - prompt_length :]
            held.output.append(fed)
        return Row(index, held.request, held.prompt, held.output)
