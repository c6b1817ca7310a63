"""Adapter for Model Runner V2: keyed by request slot, rows in any order every step.

Guidance runs in front of the sampler, on the base model's own logits; whatever a client does to logits then acts on the
guided ones. vLLM's logits-processor interface tells of the requests, and forces the tokens of a text that is only
scored. Where vLLM shards sampling over tensor-parallel ranks, a rank sees, guides and records its own requests only.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import wraps
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from steersman.guidance.rows import GuidedRequest, Row
from steersman.guidance.transfer import to_device
from steersman.server.adapters import NOT_ATTACHED, changes_logits, force_tokens
from steersman.server.drafts import Drafts
from steersman.server.loading import build_runtime, read_attached, read_span

_UNKNOWN = -1
"""Stands for a token that the device has chosen and the host has not been told of."""


@dataclass
class _Slot:
    """A guided request in its slot. Its prompt is read from vLLM's buffer once; its output is followed, and known to
    the host a step late."""

    index: int
    request: GuidedRequest
    forced: list[int] | None
    """The answer's tokens, where it is scored and not sampled."""
    changed: bool
    """Whether the client changes logits."""
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
        self.runtime = build_runtime(vllm_config, req_states.device)
        self._others = len(vllm_config.model_config.logits_processors or ()) > 1
        """Whether the operator has added logits processors, which may change the logits of any row."""
        self._sampler: Any = None
        self._unmasked: torch.Tensor | None = None
        """This step's logits before a grammar masks them, where there is one."""
        self._states = req_states
        self._slots: dict[int, _Slot] = {}
        self._stepped: list[_Slot] = []
        """Guided in the last step; most of them are in the next one."""
        self._hidden: torch.Tensor | None = None
        """[tokens, D]: the base's hidden states of this step, while it samples."""
        self._spans: dict[int, Hashable] = {}
        """By slot: texts of which hidden states are kept."""
        speculative = vllm_config.speculative_config is not None
        self._drafts = Drafts(self.runtime, req_states) if speculative else None
        """The rows of drafted tokens; None where nothing is drafted."""

    def attach(self, model_runner: Any) -> None:
        """Puts guidance between the model and the sampler of the runner."""
        self._sampler = model_runner.sampler
        _call_before(self._sampler, self.guide)
        if model_runner.rejection_sampler is not None:
            _call_before(model_runner.rejection_sampler, self.guide)
        self._follow_hidden_states(model_runner)
        grammars = model_runner.structured_outputs_worker
        if grammars is None:
            return
        apply_grammar = grammars.apply_grammar_bitmask

        @wraps(apply_grammar)
        def keep_unmasked(logits: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            # A slot keeps its finished request until another takes it: a batch without guidance pays for no copy.
            guided = any(not slot.request.finished for slot in self._slots.values())
            self._unmasked = logits.clone() if guided else None
            apply_grammar(logits, *args, **kwargs)

        grammars.apply_grammar_bitmask = keep_unmasked

    def _follow_hidden_states(self, model_runner: Any) -> None:
        sample = model_runner.sample

        @wraps(sample)
        def keep_and_sample(hidden_states: torch.Tensor, input_batch: Any, grammar_output: Any) -> Any:
            self._hidden = hidden_states
            if self._spans:
                self._keep_spans(hidden_states, input_batch)
            try:
                return sample(hidden_states, input_batch, grammar_output)
            finally:
                self._hidden = None

        model_runner.sample = keep_and_sample

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """The slot's former request has left for good or is preempted: either way its cache is given back."""
        former = self._slots.pop(req_idx, None)
        if former is not None:
            self.runtime.pause(former.request.key, former.known_tokens())
        self._spans.pop(req_idx, None)
        if (span := read_span(sampling_params)) is not None:
            self.runtime.hidden_states.expect(span)
            self._spans = {slot: key for slot, key in self._spans.items() if key != span.key} | {req_idx: span.key}
        attached = read_attached(sampling_params)
        if attached is None:
            return False
        if self._sampler is None:
            raise RuntimeError(NOT_ATTACHED)
        prompt_length = int(self._states.prompt_len.np[req_idx])
        request = self.runtime.start(attached.key, attached.plan, prompt_length, attached.seed, attached.source)
        self._slots = {slot: held for slot, held in self._slots.items() if held.request.key != attached.key}
        changed = self._others or changes_logits(sampling_params)
        self._slots[req_idx] = _Slot(req_idx, request, attached.forced, changed)
        return attached.forced is not None

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

    def guide(self, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        """Guided logits [rows, V] float32 for the model's own, of any dtype, which a grammar may have masked. Rows that
        are not guided, and those whose prompt is not read to its end, are the model's."""
        unmasked, self._unmasked = self._unmasked, None
        lengths = batch.seq_lens_cpu_upper_bound.numpy()
        held = self._find_guided(batch.idx_mapping_np, lengths)
        if self._drafts is not None:
            self._drafts.complete(self._slots)
        if not held:
            return logits
        fed = batch.input_ids[batch.logits_indices]
        positions = None
        if self._drafts is None:
            rows = [self._row(index, slot, int(lengths[index])) for index, slot in held]
            self._learn(held, fed)
        else:
            rows, positions = self._drafts.begin(held, batch)
        biased = None
        if any(slot.changed for _, slot in held):
            biased = self._bias(logits.to(torch.float32, copy=True), batch)
        guided = logits.float() if unmasked is None else unmasked.float()
        hidden = None
        if self._hidden is not None and self.runtime.models.heads:
            hidden = self._hidden[batch.logits_indices]
        self.runtime.step(guided, rows, fed.long(), biased, hidden, positions)
        # Heads, which alone guide drafts, read nothing ahead.
        self._stepped = [] if self._drafts is not None else [slot for _, slot in held]
        return guided if unmasked is None else guided.masked_fill_(logits.isneginf(), -torch.inf)

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Leaves nothing but the next token in the rows of texts that are only scored: [rows, V] float32, in place."""
        lengths = ctx.seq_lens_upper_bound_np
        forced = [
            (index, slot.forced, int(lengths[index]) - slot.request.prompt_length)
            for index, slot in self._find_guided(ctx.idx_mapping_np, lengths)
            if slot.forced is not None
        ]
        force_tokens(logits, forced)
        return logits

    def _keep_spans(self, hidden: torch.Tensor, batch: Any) -> None:
        """hidden: [tokens of the step, D]."""
        starts, lengths = batch.query_start_loc_np, batch.seq_lens_cpu_upper_bound.numpy()
        for index, slot in enumerate(batch.idx_mapping_np.tolist()):
            if (key := self._spans.get(slot)) is not None:
                start, stop = int(starts[index]), int(starts[index + 1])
                self.runtime.hidden_states.keep(key, int(lengths[index]) - (stop - start), hidden[start:stop])

    def _find_guided(self, slots: np.ndarray, lengths: np.ndarray) -> list[tuple[int, _Slot]]:
        """Rows of the step, whose slots and lengths [rows] are given, that are guided: each with its slot."""
        return [
            (index, self._slots[slot])
            for index, slot in enumerate(slots.tolist())
            if slot in self._slots
            and lengths[index] >= self._states.prefill_len.np[slot]
            and not self._slots[slot].request.finished
        ]

    def _bias(self, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        """What the sampler does to logits, but for penalties, in its order, on a copy of them."""
        context = LogitsContext(
            expanded_idx_mapping=batch.expanded_idx_mapping,
            idx_mapping=batch.idx_mapping,
            idx_mapping_np=batch.idx_mapping_np,
            expanded_local_pos=batch.expanded_local_pos,
            input_ids=batch.input_ids[batch.logits_indices],
            pos=batch.positions[batch.logits_indices],
            seq_lens_upper_bound_np=batch.seq_lens_cpu_upper_bound.numpy(),
        )
        for processor in self._sampler.logits_processors:
            if processor is not self and processor is not self._sampler.penalties_state:
                logits = processor.apply(logits, context)
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


def _call_before(sampler: Any, guide: Any) -> None:
    """Lets `guide(logits, batch)` replace the logits that a sampler is called with. Its class is extended and not
    wrapped, for vLLM looks at the class."""

    class Guided(type(sampler)):  # type: ignore[misc]
        def __call__(self, logits: torch.Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(guide(logits, input_batch), input_batch, *args, **kwargs)

    sampler.__class__ = Guided
