"""The statistics against slow or independent versions of themselves, on fresh random input."""

import itertools
import math
import random
import statistics
from functools import cache

import numpy as np
import pytest

from steersman.benchmarks.statistics import (
    estimate,
    height_over_curve,
    rouge_l,
    self_similarity,
    wilcoxon,
)


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def test_a_standard_error_is_how_far_means_of_fresh_draws_spread(rng: random.Random) -> None:
    draws = [[rng.gauss(2.0, 3.0) for _ in range(25)] for _ in range(2000)]
    estimates = [estimate(values) for values in draws]
    assert estimates[0].mean == pytest.approx(statistics.fmean(draws[0]))
    spread = statistics.stdev(e.mean for e in estimates)
    assert statistics.fmean(e.standard_error for e in estimates) == pytest.approx(spread, rel=0.15)


def test_a_single_value_has_no_standard_error_and_no_verdict() -> None:
    alone = estimate([3.0])
    assert math.isnan(alone.standard_error)
    assert (alone.verdict, alone.dump()["standard_error"], f"{alone:.1f}") == (0, None, "3.0")


def test_verdicts_on_pure_chance_are_wrong_in_about_one_case_of_twenty(rng: random.Random) -> None:
    verdicts = [estimate([rng.gauss(0, 1) for _ in range(3)]).verdict for _ in range(3000)]
    assert 0.03 < sum(map(abs, verdicts)) / len(verdicts) < 0.07


def test_verdicts_have_the_sign_of_the_mean(rng: random.Random) -> None:
    for sign in (1, -1):
        assert estimate([sign * rng.uniform(5.0, 5.2) for _ in range(3)]).verdict == sign


def test_wilcoxon_is_the_share_of_signs_that_rank_as_high(rng: random.Random) -> None:
    worse = [rng.gauss(0, 1) for _ in range(9)]
    better = [value + rng.gauss(0.4, 1) for value in worse]
    differences = [b - w for b, w in zip(better, worse, strict=True)]
    ranks = {n: rank for rank, n in enumerate(sorted(range(9), key=lambda n: abs(differences[n])), 1)}
    seen = sum(rank for n, rank in ranks.items() if differences[n] > 0)
    sums = [sum(rank for rank, up in zip(range(1, 10), ups, strict=True) if up) for ups in _signs(9)]
    assert wilcoxon(better, worse) == pytest.approx(sum(s >= seen for s in sums) / len(sums))


def test_wilcoxon_looks_at_pairs_and_not_at_the_two_samples(rng: random.Random) -> None:
    worse = [rng.gauss(0, 10) for _ in range(60)]
    better = [value + rng.uniform(0.1, 0.3) for value in worse]
    assert wilcoxon(better, worse) < 1e-9
    assert wilcoxon(worse, better) > 1 - 1e-9
    rng.shuffle(better)
    assert wilcoxon(better, worse) > 1e-4


def test_wilcoxon_of_equal_answers_tells_nothing() -> None:
    assert wilcoxon([1.0, 2.0], [1.0, 2.0]) == 1.0


def test_a_point_on_a_straight_line_lies_at_height_0_and_others_as_far_off_as_they_are(rng: random.Random) -> None:
    slope, start = rng.uniform(-2, 2), rng.uniform(-1, 1)
    xs = [rng.uniform(0, 10) for _ in range(8)]
    curve = [(x, start + slope * x) for x in xs]
    rng.shuffle(curve)
    for _ in range(20):
        x, lift = rng.uniform(min(xs), max(xs)), rng.uniform(-1, 1)
        height = height_over_curve((x, start + slope * x + lift), curve)
        assert height == pytest.approx(lift, abs=1e-9)


def test_every_point_of_a_bent_curve_lies_on_it_and_a_chord_below_it(rng: random.Random) -> None:
    curve = [(float(x), math.sqrt(x)) for x in range(10)]
    assert [height_over_curve(point, curve) for point in curve] == pytest.approx([0.0] * 10)
    x = rng.randrange(9) + rng.uniform(0.1, 0.9)
    height = height_over_curve((x, math.sqrt(x)), curve)
    assert height is not None
    assert height > 0


def test_outside_of_the_curve_nothing_is_said() -> None:
    curve = [(1.0, 0.0), (2.0, 1.0)]
    assert height_over_curve((0.9, 0.0), curve) is None
    assert height_over_curve((2.1, 0.0), curve) is None


def test_rouge_l_is_the_longest_common_subsequence_of_a_slow_recursion(rng: random.Random) -> None:
    for _ in range(200):
        one, two = ([rng.choice("abcd") for _ in range(rng.randrange(1, 12))] for _ in range(2))
        common = _slow_common(tuple(one), tuple(two))
        precision, recall = common / len(one), common / len(two)
        f1 = 2 * precision * recall / (precision + recall) if common else 0.0
        assert rouge_l(one, two) == pytest.approx(f1)


def test_rouge_l_of_nothing() -> None:
    assert rouge_l([], []) == 1.0
    assert rouge_l([], ["word"]) == 0.0


def test_self_similarity_is_the_mean_over_pairs_of_words(rng: random.Random) -> None:
    texts = [" ".join(rng.choice(("hello", "watch", "please")) for _ in range(6)) for _ in range(4)]
    pairs = [rouge_l(a.split(), b.split()) for a, b in itertools.combinations(texts, 2)]
    assert self_similarity(texts) == pytest.approx(float(np.mean(pairs)))
    assert self_similarity(["the same", "the same"]) == 1.0


def _signs(count: int) -> list[tuple[int, ...]]:
    return list(itertools.product((0, 1), repeat=count))


@cache
def _slow_common(one: tuple[str, ...], two: tuple[str, ...]) -> int:
    if not one or not two:
        return 0
    if one[-1] == two[-1]:
        return 1 + _slow_common(one[:-1], two[:-1])
    return max(_slow_common(one[:-1], two), _slow_common(one, two[:-1]))
