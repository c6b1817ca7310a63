"""Where the tokens of a forward over the paged cache lie: positions, block tables, what is written and what is seen."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from steersman.guidance.attention import AttentionBatch
from steersman.guidance.cache import BLOCK_SIZE, CachedSequence, PagedCache
from steersman.guidance.transfer import to_device


class Branches(NamedTuple):
    """What every step with as many candidates shares; T tokens a row."""

    ahead: torch.Tensor
    """[T] positions ahead of the last token."""
    seen: torch.Tensor | None
    """[T, scratch · BLOCK_SIZE]: 0 where a token sees a scratch column, -inf where not; None without scratch."""
    block: torch.Tensor
    """[T - 1] scratch block of each branch token, and its offset there."""
    offset: torch.Tensor


class Layout:
    """Batches for the attention of one cache."""

    def __init__(self, cache: PagedCache, device: torch.device) -> None:
        self._cache = cache
        self._device = device
        self._branches: dict[tuple[int, int, int], Branches] = {}

    def tables(self, sequences: Iterable[CachedSequence], longest: int) -> torch.Tensor:
        """Block tables [G, W] int64, wide enough for `longest` tokens."""
        width = -(-longest // BLOCK_SIZE)
        padded = [(s.blocks + [self._cache.padding] * width)[:width] for s in sequences]
        return to_device(padded, self._device)

    def branches(self, k: int, branches: int, scratch: int) -> Branches:
        """Of k candidates, each of `branches` tokens, in `scratch` blocks a row."""
        key = (k, branches, scratch)
        if key not in self._branches:
            column = torch.arange(k * branches, device=self._device)
            seen = None
            if scratch:
                seen = torch.full((1 + k * branches, scratch * BLOCK_SIZE), -torch.inf, device=self._device)
                seen[1 + column, column] = 0.0
                seen[1 + column, column % k] = 0.0
            ahead = torch.cat((column.new_zeros(1), 1 + column // max(k, 1)))
            self._branches[key] = Branches(ahead, seen, column // BLOCK_SIZE, column % BLOCK_SIZE)
        return self._branches[key]

    def step(
        self, sequences: Sequence[CachedSequence], lengths: Sequence[int], k: int, branches: int, scratch: int
    ) -> AttentionBatch:
        """[last token | candidates] of every row, the candidates written to scratch blocks."""
        shared = self.branches(k, branches, scratch)
        width = -(-max(lengths) // BLOCK_SIZE)
        table, last_block = [], []
        for n, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            padded = (sequence.blocks + [self._cache.padding] * width)[:width]
            table.append([*padded, *self._cache.scratch[n * scratch : (n + 1) * scratch]])
            last_block.append(sequence.blocks[(length - 1) // BLOCK_SIZE])
        tables = to_device(table, self._device)
        place = to_device([lengths, last_block], self._device).unsqueeze(-1)
        visible, block = place[0], place[1]
        offset = (visible - 1) % BLOCK_SIZE
        if branches:
            block = torch.cat((block, tables[:, width : width + 1] + shared.block), dim=1)
            offset = torch.cat((offset, shared.offset.expand(len(lengths), -1)), dim=1)
        return AttentionBatch(
            cache=self._cache,
            tables=tables,
            positions=visible - 1 + shared.ahead,
            visible=visible.expand(len(lengths), len(shared.ahead)),
            written=None,
            destinations=(block, offset),
            branches=shared.seen,
        )

    def prefill(self, rows: Sequence[tuple[CachedSequence, Sequence[int]]]) -> tuple[torch.Tensor, AttentionBatch]:
        """The tokens that each sequence has not cached yet, [G, T] int64 padded, and what they attend to."""
        news = [list(tokens[sequence.length :]) for sequence, tokens in rows]
        width = max(map(len, news))
        ids = to_device([new + [0] * (width - len(new)) for new in news], self._device)
        starts = to_device([[sequence.length] for sequence, _ in rows], self._device)
        positions = starts + torch.arange(width, device=self._device)
        written = [(g, t) for g, new in enumerate(news) for t in range(len(new))]
        places = [(s.blocks[n // BLOCK_SIZE], n % BLOCK_SIZE) for s, t in rows for n in range(s.length, len(t))]
        batch = AttentionBatch(
            cache=self._cache,
            tables=self.tables((sequence for sequence, _ in rows), max(len(tokens) for _, tokens in rows)),
            # Padding repeats a row's last position, so that no table of learned positions is overrun.
            positions=torch.minimum(positions, to_device([[len(t) - 1] for _, t in rows], self._device)),
            visible=positions + 1,
            written=_columns(written, self._device),
            destinations=_columns(places, self._device),
        )
        return ids, batch


def _columns(pairs: list[tuple[int, int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = to_device(pairs, device).T
    return first, second
