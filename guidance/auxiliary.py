"""One causal auxiliary model: load it, prove that its cached forward is right, and run packed prefills and steps."""

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from transformers import PreTrainedModel

from steersman.guidance.attention import (
    ATTENTION_NAME,
    AttentionBatch,
    AttentionSettings,
    CandidateBatch,
    ShapeProbe,
    attending,
)
from steersman.guidance.cache import BLOCK_SIZE, CachedSequence, CacheFull, LayerShape, PagedCache
from steersman.guidance.checkpoints import ModelRefused, find_vocabulary, find_window, first_line
from steersman.guidance.decoder import fuse_decoder
from steersman.guidance.graphs import Capture, CudaCapture, StepGraphs, StepInputs, choose_sizes
from steersman.guidance.layout import Layout
from steersman.guidance.streams import StreamsExhausted
from steersman.guidance.text_form import Source
from steersman.guidance.tokenizers import find_unreadable
from steersman.guidance.transfer import to_device
from steersman.kernels.dispatch import has_kernels

_PREFILL_TOKENS = 4096
"""Padded tokens a prefill forward reads at most: bounds its activations."""


logger = logging.getLogger(__name__)


class Unscorable(RuntimeError):
    """One row that an auxiliary model cannot read; its neighbours can be."""


class TextTooLong(Unscorable):
    """The row's text is longer than the model's window."""


class TextUnreadable(Unscorable):
    """The row's text has no form that the model reads."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """A request's tokens so far. `key` identifies its cache."""

    key: Hashable
    prompt: Sequence[int]
    output: Sequence[int]
    source: Source | None = None
    """What the prompt was made of, for models that read text."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def last(self) -> int:
        """The last token."""
        return self.output[-1] if self.output else self.prompt[-1]

    def tokens(self) -> list[int]:
        """All tokens, as a new list."""
        return [*self.prompt, *self.output]


def make_capture(device: torch.device) -> Capture | None:
    """How forwards become graphs on this device; None where they cannot."""
    return CudaCapture(device) if device.type == "cuda" else None


class CausalModel:
    """A Hugging Face causal model over a paged cache. `head` maps hidden states [..., D] to outputs [..., C].

    label: how errors name the model, for example "reward model 'helpful'". candidates: how many a step usually has,
    0 where the last token is alone; what CUDA graphs are captured for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        label: str,
        cache_bytes: int,
        max_rows: int,
        head: Callable[[torch.Tensor], torch.Tensor],
        candidates: Sequence[int] = (0,),
    ) -> None:
        self.label = label
        self.model = model.eval().requires_grad_(False)
        self.body: torch.nn.Module = model.base_model
        self.head = head
        self.window = find_window(model.config)
        self.vocabulary = find_vocabulary(model)
        """Token ids that it reads: those below this number."""
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        layers, settings = self._probe_layers()
        self.bytes_per_token = PagedCache.bytes_per_token(layers, self.dtype)
        blocks = cache_bytes // (self.bytes_per_token * BLOCK_SIZE) - 1
        alike = all(shape.key_width == shape.value_width for shape in layers)
        self._by_kernel = has_kernels(self.device) and alike and all(s.is_plain for s in settings)
        # The kernel takes candidates from the projection; torch reads them from the cache, where they need room.
        scratch = 0 if self._by_kernel else min(max_rows, blocks // 4)
        if blocks < 4:
            raise ModelRefused(
                f"{label}: a cache of {cache_bytes / 2**20:.2f} MiB is too small at "
                f"{self.bytes_per_token} bytes a token; give it more with --guidance-cache"
            )
        self.cache = PagedCache(layers, blocks - scratch, scratch, self.dtype, self.device)
        self.decoder = fuse_decoder(model, settings, min(self.window, blocks * BLOCK_SIZE))
        self._sequences: dict[Hashable, CachedSequence] = {}
        self._layout = Layout(self.cache, self.device)
        self.graphs = StepGraphs()
        self._capture = self._make_capture() if self._by_kernel else None
        self.probes = count()
        """Seeds of the probes that verify the model: none may read from the cache what an earlier one wrote."""
        self.sizes = [] if self._capture is None else choose_sizes(max_rows, candidates)
        """(rows, candidates) that steps are captured for."""
        if self.sizes:
            width = -(-min(self.window, self.cache.num_blocks * BLOCK_SIZE) // BLOCK_SIZE)
            self.graphs.allocate(candidates, width, self.device)

    def _make_capture(self) -> Capture | None:
        try:
            return make_capture(self.device)
        except StreamsExhausted as error:
            raise ModelRefused(f"{self.label}: {error}") from error

    def catch_up(self, prefixes: Sequence[Prefix]) -> list[int]:
        """Brings the cache of every prefix up to all but its last token; returns the tokens read for each.

        Raises Unscorable where a prefix holds a token that the model cannot read, or where a single prefix finds no
        room; CacheFull where one of several finds none.
        """
        read = [0] * len(prefixes)
        behind = [g for g, p in enumerate(prefixes) if not self.covers(p.key, len(p) - 1)]
        if behind:
            done = self.prefill([(prefixes[g].key, prefixes[g].tokens()[:-1]) for g in behind])
            for g in behind:
                result = done[prefixes[g].key]
                if isinstance(result, CacheFull):
                    raise Unscorable(f"{self.label}: {result}") if len(prefixes) == 1 else result
                read[g] = result
        return read

    def prefill(self, wanted: Sequence[tuple[Hashable, Sequence[int]]]) -> dict[Hashable, int | CacheFull]:
        """Brings each key's cache up to all of its tokens, reading only what no request has cached before.

        Returns for each key the tokens read, or the reason why there was no room for it. Raises Unscorable, before
        anything is read, where a token has no row in the embedding.
        """
        for key, tokens in wanted:
            sequence = self._sequences.get(key)
            self.require_readable(tokens if sequence is None else tokens[sequence.length :])
        done: dict[Hashable, int | CacheFull] = {}
        pending = list(wanted)
        while pending:
            batch, pending = self._admit_together(pending, done)
            for part in _split(batch, _PREFILL_TOKENS):
                self._read([(self._sequences[key], tokens) for key, tokens in part])
            for key, tokens in batch:
                self.cache.register(self._sequences[key], tokens)
        return done

    def _admit_together(
        self, pending: list[tuple[Hashable, Sequence[int]]], done: dict[Hashable, int | CacheFull]
    ) -> tuple[list[tuple[Hashable, Sequence[int]]], list[tuple[Hashable, Sequence[int]]]]:
        # A row whose next tokens another row of this batch is about to read waits for it and then shares them.
        batch, later, claimed = [], [], set()
        for key, tokens in pending:
            sequence = self._sequences.get(key)
            if sequence is None:
                sequence = self.cache.admit(tokens)
            upcoming = tuple(tokens[: sequence.length + BLOCK_SIZE])
            if upcoming in claimed and len(tokens) > sequence.length:
                if key not in self._sequences:
                    self.cache.release(sequence)
                later.append((key, tokens))
                continue
            try:
                self.cache.extend(sequence, len(tokens))
            except CacheFull as full:
                self.cache.release(sequence)
                self._sequences.pop(key, None)
                done[key] = full
                continue
            claimed.add(upcoming)
            self._sequences[key] = sequence
            done[key] = max(0, len(tokens) - sequence.length)
            if done[key]:
                batch.append((key, tokens))
        return batch, later

    def read(self, prefixes: Sequence[Prefix], last: torch.Tensor | None = None) -> tuple[torch.Tensor, list[int]]:
        """Reads the last token of every prefix, and before it what is not cached yet.

        last: [G] int64, the last tokens where the device knows them before the host does. Returns the head's outputs
        [G, C] float32 and, for each row, the tokens read for the first time beside the last one. Raises as `catch_up`
        does.
        """
        caught_up = self.catch_up(prefixes)
        tokens = self.last_tokens(prefixes, last)
        return self.step([p.key for p in prefixes], [len(p) for p in prefixes], tokens, branches=0)[:, 0], caught_up

    def last_tokens(self, prefixes: Sequence[Prefix], last: torch.Tensor | None = None) -> torch.Tensor:
        """The last tokens [G, 1] int64: those that are given, or the host's, which the model must be able to read."""
        if last is not None:
            return last.to(self.device).unsqueeze(-1)
        tokens = [prefix.last for prefix in prefixes]
        self.require_readable(tokens)
        return to_device(tokens, self.device).unsqueeze(-1)

    def step(
        self, keys: Sequence[Hashable], lengths: Sequence[int], tokens: torch.Tensor, branches: int
    ) -> torch.Tensor:
        """One forward over [last token | candidates] of every row.

        tokens: [G, 1 + k · branches] int64; column 0 is the last token of a sequence of `lengths[g]` tokens whose
        others are cached; the k candidates follow, and with branches = 2 the k tokens that follow each of them.
        Returns the head's outputs [G, k, C] float32 at the end of each branch; with branches = 0 those at the last
        token, [G, 1, C]. Outputs of tokens that the model cannot read are those of another token. Raises CacheFull.
        """
        sequences = [self._sequences[key] for key in keys]
        for sequence, length in zip(sequences, lengths, strict=True):
            self.cache.extend(sequence, length)
        scratch = 0 if self._by_kernel else -(-(tokens.shape[1] - 1) // BLOCK_SIZE)
        at_once = max(1, len(self.cache.scratch) // scratch) if scratch else len(keys)
        parts = [
            self._step(sequences[n : n + at_once], lengths[n : n + at_once], tokens[n : n + at_once], branches, scratch)
            for n in range(0, len(keys), at_once)
        ]
        for sequence, length in zip(sequences, lengths, strict=True):
            sequence.length = length
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _step(
        self,
        sequences: Sequence[CachedSequence],
        lengths: Sequence[int],
        tokens: torch.Tensor,
        branches: int,
        scratch: int,
    ) -> torch.Tensor:
        fed = tokens.shape[1]
        k = (fed - 1) // branches if branches else 0
        if self._by_kernel:
            return self._step_by_kernel(sequences, lengths, tokens, k, branches)
        hidden = self._forward(tokens, self._layout.step(sequences, lengths, k, branches, scratch))
        return self.head(hidden[:, fed - max(k, 1) :]).float()

    def _step_by_kernel(
        self, sequences: Sequence[CachedSequence], lengths: Sequence[int], tokens: torch.Tensor, k: int, branches: int
    ) -> torch.Tensor:
        cached = to_device([length - 1 for length in lengths], self.device, torch.int32)
        inputs = StepInputs(tokens, self._layout.tables(sequences, max(lengths)), cached)
        outputs = self.graphs.run(inputs) if branches <= 1 else None
        return self._forward_candidates(inputs, k, branches).float() if outputs is None else outputs

    def _forward_candidates(self, inputs: StepInputs, k: int, branches: int) -> torch.Tensor:
        ahead = self._layout.branches(k, branches, 0).ahead
        # A row that is not there reads position 0: tables of positions have none below it.
        positions = inputs.lengths.clamp(min=0).unsqueeze(-1).long() + ahead
        batch = CandidateBatch(self.cache, inputs.tables, inputs.lengths, positions, k)
        hidden = self._forward(inputs.tokens, batch)
        return self.head(hidden[:, inputs.tokens.shape[1] - max(k, 1) :])

    def read_text(self, tokens: Sequence[int]) -> torch.Tensor:
        """Hidden states [len(tokens), D] at every token of a text, read once. Raises CacheFull and Unscorable."""
        self.require_readable(tokens)
        sequence = CachedSequence()
        try:
            self.cache.extend(sequence, len(tokens))
            hidden = self._read([(sequence, tokens)])
        finally:
            self.cache.scrub(sequence)
            self.cache.release(sequence)
        return hidden[0]

    def require_readable(self, tokens: Sequence[int]) -> None:
        """Raises Unscorable where the embedding has no row for one of the tokens."""
        token = find_unreadable(tokens, self.vocabulary)
        if token is not None:
            raise TextUnreadable(f"{self.label} reads the token ids 0 to {self.vocabulary - 1}, the text holds {token}")

    def covers(self, key: Hashable, length: int) -> bool:
        """Whether this key is admitted and its first `length` tokens are cached."""
        sequence = self._sequences.get(key)
        return sequence is not None and sequence.length >= length

    def release(self, key: Hashable, tokens: Sequence[int] | None = None, failed: bool = False) -> None:
        """Gives a key's blocks back; with `tokens` they stay findable for requests that begin alike. After a failure
        nothing that is not a finite number stays behind in them."""
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return
        if failed:
            self.cache.scrub(sequence)
        elif tokens is not None:
            self.cache.register(sequence, tokens)
        self.cache.release(sequence)

    def describe(self) -> dict[str, Any]:
        """The model's window and its cache's size and use."""
        return {
            "window": self.window,
            "cache_blocks": self.cache.num_blocks,
            "cache_blocks_in_use": self.cache.blocks_in_use,
            "block_size": BLOCK_SIZE,
            "bytes_per_token": self.bytes_per_token,
            "cache_bytes": self.cache.memory,
            "weight_bytes": sum(p.numel() * p.element_size() for p in self.model.parameters()),
        }

    def _read(self, rows: list[tuple[CachedSequence, Sequence[int]]]) -> torch.Tensor:
        hidden = self._forward(*self._layout.prefill(rows))
        for sequence, tokens in rows:
            sequence.length = len(tokens)
        return hidden

    def _forward(self, ids: torch.Tensor, batch: AttentionBatch | CandidateBatch) -> torch.Tensor:
        # The base's logits may be wider than the embedding, and a GPU's assert would end the process. What is read
        # instead is never used: such candidates are masked, and a row that ends in such a token fails.
        ids = ids.clamp(0, self.vocabulary - 1)
        if self.decoder is not None:
            return self.decoder(ids, batch)
        with attending(batch):
            return self.body(input_ids=ids, position_ids=batch.positions, use_cache=False, return_dict=True)[0]

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compiles every kernel that a step may launch, and runs every captured size once as it is, in which libraries
        initialise themselves: both take the host seconds."""
        if self._by_kernel:
            self._compile_kernels()
        for rows, k in self.sizes:
            self._forward_candidates(self.graphs.inputs(rows, k), k, int(k > 0))

    def _compile_kernels(self) -> None:
        # Triton is imported where it is used: a CPU needs none.
        from steersman.kernels.production import attention_launches, distinct_launches

        query_heads = self.model.config.get_text_config().num_attention_heads
        longest = min(self.window, self.cache.num_blocks * BLOCK_SIZE)
        launches: dict[str, Any] = {}
        for shape in dict.fromkeys(self.cache.layers):
            shared = query_heads // shape.heads
            launches |= attention_launches(self.dtype, shape.key_width, shape.heads, shared, longest)
        for launch in distinct_launches(launches).values():
            launch.compile()

    @torch.inference_mode()
    def capture(self) -> Iterator[None]:
        """Makes CUDA graphs of the step, one a turn; between turns the device may do other work, within one it may
        not. Nothing where there are no graphs; where one fails the model runs without any."""
        if self._capture is None:
            return
        try:
            yield from self.graphs.capture(
                self.sizes, lambda inputs, k: self._forward_candidates(inputs, k, int(k > 0)), self._capture
            )
            return
        except RuntimeError as error:
            logger.warning("%s is run without CUDA graphs, which is slower: %s", self.label, first_line(error))
        # Not before the error is gone, whose frames hold tensors.
        self._release_graphs()

    def _release_graphs(self) -> None:
        self.graphs, self._capture, self.sizes = StepGraphs(), None, []
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _probe_layers(self) -> tuple[list[LayerShape], list[AttentionSettings]]:
        self.model.set_attn_implementation(ATTENTION_NAME)
        probe = ShapeProbe()
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        try:
            with attending(probe):
                self.body(input_ids=ids, position_ids=torch.tensor([[0, 1]], device=self.device), use_cache=False)
        except Exception as error:
            raise ModelRefused(f"{self.refusal} its forward failed under the cached attention: {error}") from error
        expected = getattr(self.model.config.get_text_config(), "num_hidden_layers", probe.calls)
        if probe.calls == 0 or sorted(probe.layers) != list(range(probe.calls)) or probe.calls != expected:
            raise ModelRefused(
                f"{self.refusal} its {expected} layers called the attention function {probe.calls} times; it does "
                "not use transformers' attention interface"
            )
        order = range(probe.calls)
        return [probe.layers[index] for index in order], [probe.settings[index] for index in order]

    @property
    def refusal(self) -> str:
        """How the reason for a refusal begins."""
        kind = getattr(self.model.config, "model_type", "unknown")
        return f"{self.label} (architecture {kind}) cannot be read token by token:"


def _split(batch: list[Any], budget: int) -> list[list[Any]]:
    """Cuts rows into parts of at most `budget` padded tokens, rows of like length together."""
    parts: list[list[Any]] = []
    width = 0
    for row in sorted(batch, key=lambda row: len(row[1])):
        width = max(width, len(row[1]))
        if parts and (len(parts[-1]) + 1) * width <= budget:
            parts[-1].append(row)
        else:
            parts.append([row])
            width = len(row[1])
    return parts
