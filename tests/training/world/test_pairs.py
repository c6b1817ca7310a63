"""Ratings of the demo world's pairs."""

import math
import random

from scipy import stats

from steersman.training.world.pairs import rate


def test_ratings_given_the_label_have_the_law_of_ratings_that_make_the_label(rng: random.Random) -> None:
    """A rating is gold plus standard Gumbel noise, whoever wins, and the higher one is the chosen response's."""
    one, two = rng.uniform(-2, 2), rng.uniform(-2, 2)
    noise: list[list[float]] = [[], []]
    for _ in range(4000):
        one_wins = rng.random() < 1 / (1 + math.exp(two - one))
        row = rate(*((one, two) if one_wins else (two, one)), rng)
        assert row["strength"] == row["score_chosen"] - row["score_rejected"] > 0
        ratings = (row["score_chosen"], row["score_rejected"])
        first, second = ratings if one_wins else reversed(ratings)
        noise[0].append(first - one)
        noise[1].append(second - two)
    for drawn in noise:
        assert stats.kstest(drawn, "gumbel_r").pvalue > 1e-6
    assert stats.pearsonr(*noise).pvalue > 1e-6
