"""Where the tokens of a forward over the paged cache lie, and which places each of them sees."""

import random

import pytest
import torch

from steersman.guidance.attention import AttentionBatch
from steersman.guidance.cache import BLOCK_SIZE, CachedSequence, LayerShape, PagedCache
from steersman.guidance.layout import Layout

Place = tuple[int, int]
"""Block and offset."""
CPU = torch.device("cpu")


def make_cache(scratch: int = 0) -> PagedCache:
    return PagedCache([LayerShape(1, 2, 2)], 64, scratch, torch.float32, CPU)


def draw_sequence(rng: random.Random, cache: PagedCache, length: int) -> CachedSequence:
    """Room for `length` tokens in blocks of no order."""
    sequence = CachedSequence()
    cache.extend(sequence, length)
    rng.shuffle(sequence.blocks)
    return sequence


def places_of(sequence: CachedSequence, length: int) -> list[Place]:
    return [(sequence.blocks[n // BLOCK_SIZE], n % BLOCK_SIZE) for n in range(length)]


def seen_by(batch: AttentionBatch, row: int, token: int) -> list[Place]:
    mask = batch.mask(None, 1, torch.float32)[row, 0, token]
    assert bool(((mask == 0) | mask.isneginf()).all())
    columns = (mask == 0).nonzero().flatten().tolist()
    table = batch.tables[row].tolist()
    return sorted((table[column // BLOCK_SIZE], column % BLOCK_SIZE) for column in columns)


def draw_lengths(rng: random.Random) -> list[int]:
    """Those at a block's end and behind it among them."""
    return [rng.randint(1, 70), BLOCK_SIZE, 2 * BLOCK_SIZE + 1, 1]


@pytest.mark.parametrize(
    ("k", "branches"), [(0, 0), (1, 1), (1, 2), (5, 1), (3, 2), (BLOCK_SIZE, 1), (BLOCK_SIZE + 3, 2)]
)
def test_a_candidate_sees_the_prefix_and_its_own_branch(rng: random.Random, k: int, branches: int) -> None:
    scratch = -(-k * branches // BLOCK_SIZE)
    lengths = draw_lengths(rng)
    cache = make_cache(scratch * len(lengths))
    sequences = [draw_sequence(rng, cache, length) for length in lengths]
    batch = Layout(cache, CPU).step(sequences, lengths, k, branches, scratch)
    assert batch.written is None, "every token is written"
    assert batch.tables.shape == (len(lengths), -(-max(lengths) // BLOCK_SIZE) + scratch)
    block, offset = batch.destinations
    taken = []
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        prefix = places_of(sequence, length)
        own = list(cache.scratch[row * scratch : (row + 1) * scratch])
        branch = [(own[n // BLOCK_SIZE], n % BLOCK_SIZE) for n in range(k * branches)]
        assert list(zip(block[row].tolist(), offset[row].tolist(), strict=True)) == [prefix[-1], *branch]
        assert batch.positions[row].tolist() == [length - 1] + [length + n // k for n in range(k * branches)]
        assert seen_by(batch, row, 0) == sorted(prefix)
        for n in range(k * branches):
            seen = {branch[n % k], branch[n]}
            assert seen_by(batch, row, 1 + n) == sorted([*prefix, *seen])
        taken += branch
    assert len(set(taken)) == len(taken), "no place is written twice"


def test_a_prefill_reads_what_is_not_cached_and_sees_what_comes_before(rng: random.Random) -> None:
    cache, rows = make_cache(), []
    for length in draw_lengths(rng):
        sequence = draw_sequence(rng, cache, length)
        sequence.length = rng.randrange(length)
        rows.append((sequence, [rng.randrange(100) for _ in range(length)]))
    ids, batch = Layout(cache, CPU).prefill(rows)
    assert batch.written is not None
    assert ids.shape[1] == max(len(tokens) - sequence.length for sequence, tokens in rows)
    assert batch.tables.shape[1] == -(-max(len(tokens) for _, tokens in rows) // BLOCK_SIZE)
    fed, kept = [], []
    for row, (sequence, tokens) in enumerate(rows):
        places = places_of(sequence, len(tokens))
        for token, n in enumerate(range(sequence.length, len(tokens))):
            assert (int(ids[row, token]), int(batch.positions[row, token])) == (tokens[n], n)
            assert seen_by(batch, row, token) == sorted(places[: n + 1])
            fed.append((row, token))
            kept.append(places[n])
        padding = batch.positions[row, len(tokens) - sequence.length :]
        assert bool((padding == len(tokens) - 1).all()), "no table of positions is overrun"
    assert list(zip(*(part.tolist() for part in batch.written), strict=True)) == fed
    assert list(zip(*(part.tolist() for part in batch.destinations), strict=True)) == kept


def test_tables_are_padded_with_a_block_that_nobody_gets(rng: random.Random) -> None:
    cache = make_cache()
    short, long = draw_sequence(rng, cache, 3), draw_sequence(rng, cache, 3 * BLOCK_SIZE)
    layout = Layout(cache, CPU)
    assert layout.tables([short, long], 3 * BLOCK_SIZE).tolist() == [[*short.blocks, *[cache.padding] * 2], long.blocks]
    assert layout.tables([long], BLOCK_SIZE + 1).tolist() == [long.blocks[:2]]
    assert cache.padding not in (*short.blocks, *long.blocks, *cache.scratch)


def test_what_steps_of_one_shape_share_is_built_once() -> None:
    layout = Layout(make_cache(8), CPU)
    shared = layout.branches(5, 2, 1)
    assert layout.branches(5, 2, 1) is shared
    assert layout.branches(5, 1, 1) is not shared
