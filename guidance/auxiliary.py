"""One causal auxiliary model: load it, prove that its cached forward is right, and run packed prefills and steps."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steersman.guidance.attention import (
    ATTENTION_NAME,
    AttentionBatch,
    AttentionSettings,
    CandidateBatch,
    ShapeProbe,
    attending,
)
from steersman.guidance.cache import BLOCK_SIZE, CachedSequence, CacheFull, LayerShape, PagedCache
from steersman.guidance.decoder import fuse_decoder
from steersman.kernels.dispatch import has_kernels

_PREFILL_TOKENS = 4096
"""Padded tokens a prefill forward reads at most: bounds its activations."""


_Layout = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]


class ModelRefused(ValueError):
    """An auxiliary model that would not be served correctly; the message says why and what would help."""


class Unscorable(RuntimeError):
    """One row that an auxiliary model cannot read; its neighbours can be."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """A request's tokens so far. `key` identifies its cache."""

    key: Hashable
    prompt: Sequence[int]
    output: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def last(self) -> int:
        """The last token."""
        return self.output[-1] if self.output else self.prompt[-1]

    def tokens(self) -> list[int]:
        """All tokens, as a new list."""
        return [*self.prompt, *self.output]


class CausalModel:
    """A Hugging Face causal model over a paged cache. `head` maps hidden states [..., D] to outputs [..., C].

    label: how errors name the model, for example "reward model 'helpful'".
    """

    def __init__(
        self,
        model: torch.nn.Module,
        label: str,
        cache_bytes: int,
        max_rows: int,
        head: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.label = label
        self.model = model.eval().requires_grad_(False)
        self.body: torch.nn.Module = model.base_model
        self.head = head
        self.window = find_window(model.config)
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
        self._layouts: dict[tuple[int, int, int], _Layout] = {}

    def catch_up(self, prefixes: Sequence[Prefix]) -> list[int]:
        """Brings the cache of every prefix up to all but its last token; returns the tokens read for each.

        Raises Unscorable where a single prefix finds no room, CacheFull where one of several does.
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

        Returns for each key the tokens read, or the reason why there was no room for it.
        """
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

    def step(
        self, keys: Sequence[Hashable], lengths: Sequence[int], tokens: torch.Tensor, branches: int
    ) -> torch.Tensor:
        """One forward over [last token | candidates] of every row.

        tokens: [G, 1 + k · branches] int64; column 0 is the last token of a sequence of `lengths[g]` tokens whose
        others are cached; the k candidates follow, and with branches = 2 the k tokens that follow each of them.
        Returns the head's outputs [G, k, C] float32 at the end of each branch; with branches = 0 those at the last
        token, [G, 1, C]. Raises CacheFull.
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
        rows, fed = tokens.shape
        k = (fed - 1) // branches if branches else 0
        if self._by_kernel:
            hidden = self._forward(tokens, self._candidate_batch(sequences, lengths, k, branches))
            return self.head(hidden[:, fed - max(k, 1) :]).float()
        ahead, seen, own_blocks, own_offsets = self._candidate_layout(k, branches, scratch)
        width = -(-max(lengths) // BLOCK_SIZE)
        table, last_block = [], []
        for n, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            padded = (sequence.blocks + [self.cache.padding] * width)[:width]
            table.append([*padded, *self.cache.scratch[n * scratch : (n + 1) * scratch]])
            last_block.append(sequence.blocks[(length - 1) // BLOCK_SIZE])
        tables = torch.tensor(table, device=self.device)
        place = torch.tensor([lengths, last_block], device=self.device).unsqueeze(-1)
        length, block = place[0], place[1]
        batch = AttentionBatch(
            cache=self.cache,
            tables=tables,
            positions=length - 1 + ahead,
            visible=length.expand(rows, fed),
            written=None,
            destinations=(block, (length - 1) % BLOCK_SIZE),
            branches=seen,
        )
        if branches:
            block, offset = batch.destinations
            batch.destinations = (
                torch.cat((block, tables[:, width : width + 1] + own_blocks), dim=1),
                torch.cat((offset, own_offsets.expand(rows, -1)), dim=1),
            )
        hidden = self._forward(tokens, batch)
        return self.head(hidden[:, fed - max(k, 1) :]).float()

    def _candidate_batch(
        self, sequences: Sequence[CachedSequence], lengths: Sequence[int], k: int, branches: int
    ) -> CandidateBatch:
        cached = torch.tensor(lengths, dtype=torch.int32, device=self.device) - 1
        ahead = self._candidate_layout(k, branches, 0)[0]
        return CandidateBatch(
            self.cache, self._tables(sequences, max(lengths)), cached, cached.unsqueeze(-1).long() + ahead, k
        )

    def _candidate_layout(self, k: int, branches: int, scratch: int) -> _Layout:
        """What is the same in every step: positions ahead of the last token [T], scratch columns' mask
        [T, scratch · BLOCK_SIZE] or None without scratch, and each branch token's scratch block and offset [T - 1]."""
        key = (k, branches, scratch)
        if key not in self._layouts:
            column = torch.arange(k * branches, device=self.device)
            seen = None
            if scratch:
                seen = torch.full((1 + k * branches, scratch * BLOCK_SIZE), -torch.inf, device=self.device)
                seen[1 + column, column] = 0.0
                seen[1 + column, column % k] = 0.0
            ahead = torch.cat((column.new_zeros(1), 1 + column // max(k, 1)))
            self._layouts[key] = (ahead, seen, column // BLOCK_SIZE, column % BLOCK_SIZE)
        return self._layouts[key]

    def outputs(self, tokens: Sequence[int]) -> torch.Tensor:
        """The head's outputs [len(tokens), C] float32 at every token of a text, read once. Raises CacheFull."""
        sequence = CachedSequence()
        try:
            self.cache.extend(sequence, len(tokens))
            hidden = self._read([(sequence, tokens)])
        finally:
            self.cache.scrub(sequence)
            self.cache.release(sequence)
        return self.head(hidden[0]).float()

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
        }

    def _read(self, rows: list[tuple[CachedSequence, Sequence[int]]]) -> torch.Tensor:
        news = [list(tokens[sequence.length :]) for sequence, tokens in rows]
        width = max(map(len, news))
        ids = torch.tensor([new + [0] * (width - len(new)) for new in news], device=self.device)
        starts = torch.tensor([[sequence.length] for sequence, _ in rows], device=self.device)
        positions = starts + torch.arange(width, device=self.device)
        written = [(g, t) for g, new in enumerate(news) for t in range(len(new))]
        batch = AttentionBatch(
            cache=self.cache,
            tables=self._tables([sequence for sequence, _ in rows], max(len(tokens) for _, tokens in rows)),
            # Padding repeats a row's last position, so that no table of learned positions is overrun.
            positions=torch.minimum(positions, torch.tensor([[len(t) - 1] for _, t in rows], device=self.device)),
            visible=positions + 1,
            written=tuple(torch.tensor(written, device=self.device).T),
            destinations=self._destinations([(s, range(s.length, len(tokens))) for s, tokens in rows]),
        )
        hidden = self._forward(ids, batch)
        for sequence, tokens in rows:
            sequence.length = len(tokens)
        return hidden

    def _forward(self, ids: torch.Tensor, batch: AttentionBatch | CandidateBatch) -> torch.Tensor:
        if self.decoder is not None:
            return self.decoder(ids, batch)
        with attending(batch):
            return self.body(input_ids=ids, position_ids=batch.positions, use_cache=False, return_dict=True)[0]

    def _tables(self, sequences: Sequence[CachedSequence], longest: int) -> torch.Tensor:
        width = -(-longest // BLOCK_SIZE)
        padded = [(s.blocks + [self.cache.padding] * width)[:width] for s in sequences]
        return torch.tensor(padded, device=self.device)

    def _destinations(self, rows: list[tuple[CachedSequence, Sequence[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = [s.blocks[n // BLOCK_SIZE] for s, positions in rows for n in positions]
        offsets = [n % BLOCK_SIZE for _, positions in rows for n in positions]
        return torch.tensor(blocks, device=self.device), torch.tensor(offsets, device=self.device)

    @torch.inference_mode()
    def _probe_layers(self) -> tuple[list[LayerShape], list[AttentionSettings]]:
        self.model.set_attn_implementation(ATTENTION_NAME)
        probe = ShapeProbe()
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        try:
            with attending(probe):
                self.body(input_ids=ids, position_ids=torch.tensor([[0, 1]], device=self.device), use_cache=False)
        except Exception as error:
            raise ModelRefused(f"{self._refusal()} its forward failed under the cached attention: {error}") from error
        expected = getattr(self.model.config.get_text_config(), "num_hidden_layers", probe.calls)
        if probe.calls == 0 or sorted(probe.layers) != list(range(probe.calls)) or probe.calls != expected:
            raise ModelRefused(
                f"{self._refusal()} its {expected} layers called the attention function {probe.calls} times; it does "
                "not use transformers' attention interface"
            )
        order = range(probe.calls)
        return [probe.layers[index] for index in order], [probe.settings[index] for index in order]

    def _refusal(self) -> str:
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


def find_head(model: torch.nn.Module) -> torch.nn.Module:
    """The module that maps hidden states to outputs: the only child beside the body that is not dropout."""
    heads = [
        (name, child)
        for name, child in model.named_children()
        if child is not model.base_model and not isinstance(child, torch.nn.Dropout)
    ]
    if len(heads) != 1:
        names = ", ".join(name for name, _ in heads) or "none"
        raise ModelRefused(f"{type(model).__name__} has not one output head beside its body but: {names}")
    return heads[0][1]


def find_window(config: Any) -> int:
    """Longest sequence the model was made for, in tokens."""
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx")]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=2**31)


def verify(
    causal: CausalModel, evaluate: Callable[[torch.Tensor], torch.Tensor], vocabulary: int, candidates: int
) -> None:
    """Compares cached outputs with plain full forwards; raises ModelRefused where they differ.

    evaluate: full forward of the unchanged model, ids [1, n] → outputs [C] at the last token.
    candidates: how many branch off each sequence, 0 to compare at the sequence's own last token.
    """
    generator = torch.Generator().manual_seed(0)
    config = causal.model.config.get_text_config()
    local = [getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_window")]
    reach = max((w for w in local if isinstance(w, int) and w <= 512), default=8)
    lengths = [min(reach + 9, causal.window - 2), 5]
    sequences = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]
    branches = torch.randint(vocabulary, (2, candidates), generator=generator).to(causal.device)
    prefixes = [Prefix(f"probe-{n}", sequence, []) for n, sequence in enumerate(sequences)]
    causal.catch_up(prefixes)
    last = torch.tensor([[s[-1]] for s in sequences], device=causal.device)
    cached = causal.step([p.key for p in prefixes], lengths, torch.cat((last, branches), dim=1), int(candidates > 0))
    for prefix in prefixes:
        causal.release(prefix.key)
    full = torch.stack(
        [
            torch.stack([evaluate(torch.tensor([[*s, *suffix]])) for suffix in [[v] for v in row] or [[]]])
            for s, row in zip(sequences, branches.tolist(), strict=True)
        ]
    ).to(cached.device)
    error = (cached - full).abs().max().item()
    scale = max(1.0, full.abs().max().item())
    allowed = scale * (1e-3 if causal.dtype == torch.float32 else 4e-2)
    if not math.isfinite(error) or error > allowed:
        raise ModelRefused(
            f"{causal._refusal()} cached outputs differ from plain forwards by {error:.2g} (allowed {allowed:.2g})"
        )


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """The eager implementation is a model's definition: others leave out what they cannot do (capped scores)."""
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


def require_safetensors(path: str | Path, label: str, config: str = "config.json") -> None:
    """Refuses a local checkpoint folder that has no safetensors file."""
    folder = Path(path)
    if not folder.exists():
        if str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
            raise ModelRefused(f"{label}: {path} does not exist")
        return
    if not folder.is_dir() or not (folder / config).is_file():
        raise ModelRefused(f"{label}: {path} is not a checkpoint folder ({config} is missing)")
    if not any(folder.glob("*.safetensors")):
        raise ModelRefused(
            f"{label}: {path} holds no *.safetensors file; other formats can run code when they are "
            "loaded. Save it again with save_pretrained(safe_serialization=True)"
        )


def first_line(error: Exception) -> str:
    """The start of an error's message, for a sentence of ours."""
    return str(error).strip().split("\n")[0][:300]
