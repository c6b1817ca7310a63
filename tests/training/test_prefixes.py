"""Where pairs are cut."""

import random
from collections import Counter

import pytest

from steersman.training.data.preferences import TokenizedPreference
from steersman.training.prefixes import ALL_PREFIXES, SHARES, cut, draw_cuts, draw_subset, tokens_at
from steersman.training.rewards.causal import causal_rows
from steersman.training.rewards.pairs import subset_rows

EOS = 1


def random_rows(seed: int, count: int = 40) -> list[TokenizedPreference]:
    print("seed", seed)
    rng = random.Random(seed)

    def ids(low: int) -> list[int]:
        return [rng.randrange(2, 50) for _ in range(rng.randint(low, 12))]

    return [TokenizedPreference(ids(1), [*ids(0), EOS], [*ids(0), EOS]) for _ in range(count)]


def test_a_cut_keeps_the_first_tokens_and_leaves_a_shorter_response_whole() -> None:
    response = [5, 6, 7, EOS]
    assert [cut(response, i) for i in (1, 3, 4, 9)] == [[5], [5, 6, 7], response, response]


def test_cuts_at_shares_of_the_longer_response() -> None:
    assert [tokens_at(share, 12) for share in SHARES] == [2, 3, 6, 9, 12]
    assert [tokens_at(share, 1) for share in SHARES] == [1] * 5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.5, 3.0])
def test_a_subset_has_as_many_different_partial_sequences_as_asked(seed: int, ratio: float) -> None:
    longer = [row.longer for row in random_rows(seed)]
    subset = draw_subset(longer, ratio, seed)
    assert len(subset) == round(ratio * len(longer)) == len(set(subset))
    assert all(1 <= i <= longer[pair] for pair, i in subset)
    assert subset == draw_subset(longer, ratio, seed) != draw_subset(longer, ratio, seed + 1)


def test_a_subset_of_everything_is_everything() -> None:
    assert draw_subset([2, 1, 3], 100.0, 0) == [(0, 1), (0, 2), (1, 1), (2, 1), (2, 2), (2, 3)]
    assert draw_subset([], 1.5, 0) == []


def test_every_partial_sequence_is_as_likely_as_another() -> None:
    counts = Counter(pair for seed in range(4000) for pair in draw_subset([1, 3], 0.5, seed))
    # One of four a draw: 1000 each, with a standard deviation of 27.
    assert set(counts) == {(0, 1), (1, 1), (1, 2), (1, 3)}
    assert all(abs(count - 1000) < 5 * 27 for count in counts.values())


def test_cuts_of_one_pair_differ_and_are_all_where_there_are_few() -> None:
    cuts = draw_cuts(30, 10, random.Random(0))
    assert cuts == sorted(set(cuts))
    assert len(cuts) == 10
    assert draw_cuts(4, 10, random.Random(0)) == draw_cuts(4, ALL_PREFIXES, random.Random(0)) == [1, 2, 3, 4]


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_a_subset_are_cut_alike_and_gain_no_end_token(seed: int) -> None:
    rows = random_rows(seed)
    dataset = subset_rows(rows, 2.0, seed)
    assert len(dataset) == 2 * len(rows)
    for (pair, i), example in zip(draw_subset([row.longer for row in rows], 2.0, seed), dataset, strict=True):
        row = rows[pair]
        for ids, response in ((example["chosen_ids"], row.chosen), (example["rejected_ids"], row.rejected)):
            assert ids == row.prompt + response[:i]
            assert (ids[-1] == EOS) == (i >= len(response))


@pytest.mark.parametrize("seed", range(3))
def test_positions_of_causal_rows_are_the_last_tokens_of_the_prefixes(seed: int) -> None:
    rows = random_rows(seed)
    for row, example in zip(rows, causal_rows(rows, 5, seed), strict=True):
        assert len(example["chosen_positions"]) == len(example["rejected_positions"]) == min(5, row.longer)
        assert example["chosen_ids"] == row.prompt + row.chosen
        whole = [(len(row.prompt) + len(response) - 1) for response in (row.chosen, row.rejected)]
        for chosen, rejected in zip(example["chosen_positions"], example["rejected_positions"], strict=True):
            i = max(chosen, rejected) - len(row.prompt) + 1
            assert [chosen, rejected] == [min(len(row.prompt) + i - 1, end) for end in whole]
