"""The paged cache: prefixes are found again, blocks come back, the bound holds."""

import random

import pytest
import torch

from steersman.guidance.cache import BLOCK_SIZE, CachedSequence, CacheFull, LayerShape, PagedCache

LAYERS = [LayerShape(2, 4, 6), LayerShape(1, 4, 4)]


def _cache(blocks: int) -> PagedCache:
    return PagedCache(LAYERS, blocks, 2, torch.float32, "cpu")


def _fill(cache: PagedCache, sequence: CachedSequence, tokens: list[int]) -> None:
    """Writes each token's number as its key and value, as a forward would."""
    cache.extend(sequence, len(tokens))
    for n in range(sequence.length, len(tokens)):
        for layer in (*cache.keys, *cache.values):
            layer[:, sequence.blocks[n // BLOCK_SIZE], n % BLOCK_SIZE] = tokens[n]
    sequence.length = len(tokens)


def _contents(cache: PagedCache, sequence: CachedSequence) -> list[float]:
    return [
        float(cache.keys[0][0, sequence.blocks[n // BLOCK_SIZE], n % BLOCK_SIZE, 0]) for n in range(sequence.length)
    ]


def test_random_traffic_never_mixes_up_tokens_and_gives_every_block_back() -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    cache = _cache(24)
    running: list[tuple[CachedSequence, list[int]]] = []
    texts: list[list[int]] = [[]]
    reused = 0
    for _ in range(600):
        if running and rng.random() < 0.5:
            sequence, tokens = running.pop(rng.randrange(len(running)))
            if rng.random() < 0.7:
                cache.register(sequence, tokens)
            cache.release(sequence)
            continue
        known = rng.choice(texts)
        tokens = known[: rng.randint(0, len(known))] + [rng.randrange(100) for _ in range(rng.randint(1, 40))]
        sequence = cache.admit(tokens)
        reused += sequence.length
        assert _contents(cache, sequence) == tokens[: sequence.length]
        try:
            _fill(cache, sequence, tokens)
        except CacheFull:
            cache.release(sequence)
            continue
        cache.register(sequence, tokens)
        running.append((sequence, tokens))
        texts.append(tokens)
        for other, expected in running:
            assert _contents(cache, other) == expected, "a running request's cache was overwritten"
    assert reused > 0
    for sequence, _ in running:
        cache.release(sequence)
    assert cache.blocks_in_use == 0


def test_the_longest_known_prefix_is_reused_to_the_token() -> None:
    cache = _cache(16)
    tokens = list(range(2 * BLOCK_SIZE + 7))
    first = cache.admit(tokens)
    assert first.length == 0
    _fill(cache, first, tokens)
    cache.register(first, tokens)
    second = cache.admit([*tokens[: 2 * BLOCK_SIZE + 5], 999])
    assert second.length == 2 * BLOCK_SIZE + 5
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] != first.blocks[2], "a block that both go on writing to was shared"
    assert cache.admit([5, *tokens]).length == 0


def test_a_full_cache_refuses_and_leaves_the_sequence_as_it_was() -> None:
    cache = _cache(3)
    held = cache.admit([])
    cache.extend(held, 2 * BLOCK_SIZE)
    other = cache.admit([])
    with pytest.raises(CacheFull, match="2 more cache blocks needed, 1 of 3 are free"):
        cache.extend(other, BLOCK_SIZE + 1)
    assert other.blocks == []
    cache.release(held)
    cache.extend(other, 3 * BLOCK_SIZE)
    assert cache.blocks_in_use == 3


def test_what_no_one_uses_is_overwritten_oldest_first() -> None:
    cache = _cache(4)
    for start in (0, 1000):
        tokens = list(range(start, start + BLOCK_SIZE))
        sequence = cache.admit(tokens)
        _fill(cache, sequence, tokens)
        cache.register(sequence, tokens)
        cache.release(sequence)
    greedy = cache.admit([])
    cache.extend(greedy, 3 * BLOCK_SIZE)
    assert cache.admit(list(range(BLOCK_SIZE))).length == 0
    assert cache.admit(list(range(1000, 1000 + BLOCK_SIZE))).length == BLOCK_SIZE


def test_scrubbing_leaves_no_number_behind_that_is_not_finite() -> None:
    cache = _cache(4)
    tokens = list(range(BLOCK_SIZE + 3))
    sequence = cache.admit(tokens)
    _fill(cache, sequence, tokens)
    cache.values[1][:, sequence.blocks[1], 1] = torch.nan
    cache.keys[0][:, cache.scratch[1], 2] = torch.inf
    cache.register(sequence, tokens)
    cache.scrub(sequence)
    cache.release(sequence)
    assert all(bool(layer.isfinite().all()) for layer in (*cache.keys, *cache.values))
    assert cache.admit(tokens).length == BLOCK_SIZE, "the sound block is forgotten or the unsound one is not"


def test_bytes_are_what_the_tensors_take() -> None:
    cache = _cache(5)
    taken = sum(layer.nbytes for layer in (*cache.keys, *cache.values))
    assert PagedCache.bytes_per_token(LAYERS, torch.float32) * BLOCK_SIZE * (5 + 1 + 2) == taken
