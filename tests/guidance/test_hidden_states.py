"""Hidden states of a text, kept while it is read in pieces: what is taken is what was computed last, whole or not at
all."""

import itertools
import random

import pytest
import torch

from steersman.guidance import hidden_states
from steersman.guidance.hidden_states import HiddenStateStore, Span

WIDTH = 6


@pytest.fixture
def store() -> HiddenStateStore:
    return HiddenStateStore()


def pieces(rng: random.Random, length: int) -> list[tuple[int, int]]:
    """A text of `length` tokens in pieces of random sizes: where each begins and ends."""
    cuts = sorted({0, length, *(rng.randrange(length) for _ in range(rng.randrange(5)))})
    return list(itertools.pairwise(cuts))


def test_a_span_over_several_pieces_is_put_together(store: HiddenStateStore, rng: random.Random) -> None:
    for key in range(30):
        length = rng.randint(2, 40)
        start = rng.randrange(length)
        stop = rng.randint(start + 1, length)
        hidden = torch.randn(length, WIDTH)
        store.expect(Span(key, start, stop))
        for begin, end in pieces(rng, length):
            store.keep(key, begin, hidden[begin:end])
        assert torch.equal(store.take(key), hidden[start:stop])


def test_what_is_kept_is_a_copy(store: HiddenStateStore) -> None:
    """The runner writes the next step to the same memory."""
    memory = torch.randn(5, WIDTH)
    before = memory.clone()
    store.expect(Span("a", 1, 4))
    store.keep("a", 0, memory)
    memory.fill_(7.0)
    assert torch.equal(store.take("a"), before[1:4])


def test_a_position_that_is_computed_again_replaces_what_was_kept(store: HiddenStateStore) -> None:
    first, second = torch.randn(2, 8, WIDTH)
    store.expect(Span("a", 2, 7))
    store.keep("a", 0, first[:5])
    store.keep("a", 0, second[:6])
    store.keep("a", 6, second[6:])
    assert torch.equal(store.take("a"), second[2:7])


def test_a_text_that_begins_anew_forgets_what_was_kept(store: HiddenStateStore) -> None:
    hidden = torch.randn(4, WIDTH)
    store.expect(Span("a", 0, 4))
    store.keep("a", 0, hidden)
    store.expect(Span("a", 0, 4))
    store.keep("a", 2, hidden[2:])
    with pytest.raises(RuntimeError, match="position 0 of the text was not computed"):
        store.take("a")


def test_a_position_that_was_not_computed_is_named(store: HiddenStateStore, rng: random.Random) -> None:
    missing = rng.randrange(3, 9)
    store.expect(Span("a", 3, 9))
    for position in range(10):
        if position != missing:
            store.keep("a", position, torch.randn(1, WIDTH))
    with pytest.raises(RuntimeError, match=f"position {missing} of the text was not computed"):
        store.take("a")
    assert "a" not in store, "it is forgotten all the same"


def test_texts_do_not_mix_and_are_taken_once(store: HiddenStateStore) -> None:
    hidden = {key: torch.randn(3, WIDTH) for key in "abc"}
    for key in hidden:
        store.expect(Span(key, 0, 3))
    for key, states in hidden.items():
        store.keep(key, 0, states)
    store.keep("unknown", 0, torch.randn(3, WIDTH))
    for key in "cab":
        assert torch.equal(store.take(key), hidden[key])
        assert key not in store
    assert "unknown" not in store
    with pytest.raises(KeyError):
        store.take("unknown")


def test_a_text_that_nobody_waits_for_any_more_is_let_go(store: HiddenStateStore) -> None:
    store.expect(Span("a", 0, 2))
    store.keep("a", 0, torch.randn(1, WIDTH))
    store.forget("a")
    store.forget("a")
    store.keep("a", 1, torch.randn(1, WIDTH))
    assert "a" not in store


def test_the_oldest_texts_that_nobody_comes_for_are_forgotten(
    store: HiddenStateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden_states, "_KEPT", 3)
    for key in range(3):
        store.expect(Span(key, 0, 1))
    store.expect(Span(0, 0, 1))
    store.expect(Span(3, 0, 1))
    for key in range(4):
        store.keep(key, 0, torch.full((1, WIDTH), float(key)))
    assert [key for key in range(4) if key in store] == [0, 2, 3], "1 was the oldest"
