"""Adapter for vLLM's V1 model runner: keyed by batch row, told of rows added, moved and removed.

Guidance runs in front of the sampler, on the base model's own logits; whatever a client does to logits then acts on the
guided ones. vLLM's logits-processor interface tells of the batch, and forces the tokens of a text that is only scored.
"""

from collections.abc import Hashable
from functools import wraps
from typing import Any

import numpy as np
import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.sample.ops.bad_words import apply_bad_words

from steersman.guidance.rows import Row
from steersman.server.adapters import NOT_ATTACHED, changes_logits, force_tokens
from steersman.server.loading import build_runtime, read_attached, read_span
from steersman.server.partial_prefill import PartialRows, keep_seeded_requests_alive, partial_rows


class GuidanceLogitsProcessor(LogitsProcessor):
    """Guides the rows whose requests ask for it; a batch without such rows costs one dictionary lookup."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.runtime = build_runtime(vllm_config, device)
        self._others = len(vllm_config.model_config.logits_processors or ()) > 1
        """Whether the operator has added logits processors, which may change the logits of any row."""
        self._partial_rows: PartialRows | None = None
        self._rows: dict[int, Row] = {}
        self._listed: list[Row] | None = None
        """The rows, the same list until one comes, goes or moves."""
        self._forced: dict[Any, list[int]] = {}
        """By request: the tokens of an answer that is scored and not sampled."""
        self._changed: set[Any] = set()
        """Requests whose clients change logits."""
        self._unmasked: torch.Tensor | None = None
        """This step's logits before a grammar masks them, where there is one."""
        self._hidden: torch.Tensor | None = None
        """[rows, D]: the hidden states that this step's logits were computed from."""
        self._spans: dict[int, Hashable] = {}
        """By row: texts of which hidden states are kept."""

    def attach(self, model_runner: Any) -> None:
        """Puts guidance between the model and the sampler of the runner."""
        sampler = model_runner.sampler
        forward, sample_tokens = sampler.forward, model_runner.sample_tokens

        @wraps(forward)
        def guide_and_sample(logits: torch.Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
            return forward(self.guide(logits, sampling_metadata), sampling_metadata, *args, **kwargs)

        @wraps(sample_tokens)
        def keep_and_sample(grammar_output: Any) -> Any:
            self._unmasked = self._hidden = None
            state = model_runner.execute_model_state
            if state is not None and state.logits is not None:
                self._hidden = state.sample_hidden_states
                if self._rows and grammar_output is not None:
                    self._unmasked = state.logits.clone()
                if self._spans:
                    self._keep_spans(model_runner, state.hidden_states)
            return sample_tokens(grammar_output)

        sampler.forward, model_runner.sample_tokens = guide_and_sample, keep_and_sample
        self._partial_rows = partial_rows(model_runner)
        keep_seeded_requests_alive(model_runner)

    def is_argmax_invariant(self) -> bool:
        """A forced token is the most likely one."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows the batch. vLLM does not list a row as removed when another takes its place at once."""
        if batch_update is None:
            return
        self._listed = None
        for index in batch_update.removed:
            self._drop(index)
        for index, params, prompt, output in batch_update.added:
            self._drop(index)
            if (span := read_span(params)) is not None:
                self.runtime.hidden_states.expect(span)
                self._spans[index] = span.key
            attached = read_attached(params)
            # A guided prompt is never given as embeddings, so its tokens are there.
            if attached is not None:
                if self._partial_rows is None:
                    raise RuntimeError(NOT_ATTACHED)
                request = self.runtime.start(attached.key, attached.plan, len(prompt), attached.seed, attached.source)
                self._rows[index] = Row(index, request, prompt, output)
                if attached.forced is not None:
                    self._forced[attached.key] = attached.forced
                if self._others or changes_logits(params):
                    self._changed.add(attached.key)
        for source, target, direction in batch_update.moved:
            self._move(source, target, direction is MoveDirectionality.SWAP)

    def guide(self, logits: torch.Tensor, sampling_metadata: Any) -> torch.Tensor:
        """Guided logits [rows, V] float32 for the model's own, of any dtype, which a grammar may have masked. Rows that
        are not guided, and those whose prompt is not read to its end, are the model's."""
        unmasked, self._unmasked = self._unmasked, None
        if self._listed is None:
            self._listed = list(self._rows.values())
        rows = self._listed
        if rows and self._partial_rows is not None and np.count_nonzero(partial := self._partial_rows()[: len(logits)]):
            rows = [row for row in rows if not partial[row.index]]
        if not rows:
            return logits
        biased = None
        if self._changed and any(row.request.key in self._changed for row in rows):
            biased = self._bias(logits.to(torch.float32, copy=True), sampling_metadata)
        guided = logits.float() if unmasked is None else unmasked.float()
        self.runtime.step(guided, rows, biased=biased, hidden=self._hidden)
        return guided if unmasked is None else guided.masked_fill_(logits.isneginf(), -torch.inf)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Leaves nothing but the next token in the rows of texts that are only scored: [rows, V] float32, in place."""
        if self._forced:
            rows = [row for row in self._rows.values() if row.request.key in self._forced]
            force_tokens(logits, [(row.index, self._forced[row.request.key], row.position) for row in rows])
        return logits

    def _bias(self, logits: torch.Tensor, sampling_metadata: Any) -> torch.Tensor:
        """What the sampler does to logits before penalties, in its order, on a copy of them."""
        if sampling_metadata.allowed_token_ids_mask is not None:
            logits.masked_fill_(sampling_metadata.allowed_token_ids_mask, -torch.inf)
        if sampling_metadata.bad_words_token_ids:
            apply_bad_words(logits, sampling_metadata.bad_words_token_ids, sampling_metadata.output_token_ids)
        for processor in sampling_metadata.logitsprocs.non_argmax_invariant:
            if processor is not self:
                logits = processor.apply(logits)
        return logits

    def _keep_spans(self, model_runner: Any, hidden: torch.Tensor) -> None:
        """hidden: [tokens of the step, D]."""
        starts, computed = model_runner.query_start_loc.np, model_runner.input_batch.num_computed_tokens_cpu
        for index, key in self._spans.items():
            part = hidden[int(starts[index]) : int(starts[index + 1])]
            self.runtime.hidden_states.keep(key, int(computed[index]), part)

    def _drop(self, index: int) -> None:
        self._spans.pop(index, None)
        row = self._rows.pop(index, None)
        if row is not None:
            self._forced.pop(row.request.key, None)
            self._changed.discard(row.request.key)
            self.runtime.pause(row.request.key, [*row.prompt, *row.output])

    def _move(self, source: int, target: int, swap: bool) -> None:
        moved, displaced = self._rows.pop(source, None), self._rows.get(target)
        span, displaced_span = self._spans.pop(source, None), self._spans.get(target)
        if swap:
            self._rows.pop(target, None)
            self._spans.pop(target, None)
            self._place(displaced, displaced_span, source)
        else:
            self._drop(target)
        self._place(moved, span, target)

    def _place(self, row: Row | None, span: Hashable | None, index: int) -> None:
        if row is not None:
            row.index = index
            self._rows[index] = row
        if span is not None:
            self._spans[index] = span
