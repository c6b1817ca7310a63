"""The enumerable world against plain enumeration, and the benchmark in small."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy.special import expit

from steersman.benchmarks.calibration import read_rewards, reverse_prefixes, train
from steersman.benchmarks.calibration_error import average, calibrate, loss_of
from steersman.benchmarks.calibration_report import Kind, report
from steersman.benchmarks.enumerable import World, fit_rewards, tokens

SMALL = World(longest=2)


def test_the_preference_of_prefixes_is_the_average_over_how_answers_go_on(rng: random.Random) -> None:
    world = World(longest=4)
    assert world.probability.sum() == pytest.approx(1)
    cut, other = rng.choice(world.cuts), rng.choice(world.cuts)
    one, two = rng.choice(world.prefixes(cut)), rng.choice(world.prefixes(other))
    print(cut, other, one, two)
    rows = list(zip(world.answers, world.probability.tolist(), world.gold.tolist(), strict=True))
    above, total = 0.0, 0.0
    for first, p, gold in rows:
        for second, q, other_gold in rows:
            if tokens(first)[:cut] == one and tokens(second)[:other] == two:
                above += p * q / (1 + math.exp(other_gold - gold))
                total += p * q
    found = world.preferred(cut, other)[world.prefixes(cut).index(one), world.prefixes(other).index(two)]
    assert found == pytest.approx(above / total)


def test_best_rewards_are_gold_where_preferences_come_from_rewards(rng: random.Random) -> None:
    gold, weights = np.array([rng.gauss(0, 1) for _ in range(9)]), np.array([rng.random() for _ in range(9)])
    found = fit_rewards(expit(gold[:, None] - gold), weights / weights.sum())
    np.testing.assert_allclose(found - found.mean(), gold - gold.mean(), atol=1e-6)


def test_calibration_error_is_by_bins_and_weights() -> None:
    predicted = np.array([[0.12, 0.18], [0.95, 0.95]])
    exact, weights = np.array([[0.1, 0.3], [0.9, 0.7]]), np.array([[1.0, 3.0], [2.0, 2.0]])
    found = calibrate(predicted, exact, weights)
    assert found.mean == pytest.approx((0.02 + 3 * 0.12 + 2 * 0.05 + 2 * 0.25) / 8)
    assert found.largest == pytest.approx(0.25)
    low, high = abs((0.12 + 3 * 0.18) - (0.1 + 3 * 0.3)) / 4, 0.95 - 0.8
    assert found.ece == pytest.approx((low + high) / 2)
    assert average([found, found]).ece == pytest.approx(found.ece)


def test_the_loss_is_least_at_gold(rng: random.Random) -> None:
    other = SMALL.gold + np.array([rng.gauss(0, 0.5) for _ in SMALL.gold])
    assert loss_of(SMALL, SMALL.gold + 3) == pytest.approx(loss_of(SMALL, SMALL.gold))
    assert loss_of(SMALL, SMALL.gold) < loss_of(SMALL, other)


def test_a_partial_model_is_calibrated_and_prefixes_can_be_made_to_say_the_opposite(tmp_path: Path) -> None:
    """9 answers and 1,000 labels: at equal cuts the average error of P is below 0.1; untrained it is above 0.15."""
    trained = train(SMALL, tmp_path, "partial", seed=0, pairs=1000, epochs=1)
    partial = Kind("partial", SMALL, [read_rewards(SMALL, trained)])
    untrained = Kind("untrained", SMALL, [[np.zeros_like(rewards) for rewards in partial.seeds[0]]])
    assert partial.at_equal_cuts[0].mean < 0.1
    assert untrained.at_equal_cuts[0].mean > 0.15
    reverse_prefixes(SMALL, trained, tmp_path / "reversed", steps=120)
    opposite = Kind("full", SMALL, [read_rewards(SMALL, tmp_path / "reversed")])
    assert max(opposite.with_right[0][:-1]) < -0.9
    assert loss_of(SMALL, opposite.seeds[0][-1]) == pytest.approx(loss_of(SMALL, partial.seeds[0][-1]), abs=0.01)
    report(partial, opposite, opposite.seeds[0], 1000).write(tmp_path / "calibration", Console(quiet=True))
    assert "Lemma 2 at equal cuts" in (tmp_path / "calibration.md").read_text()
    assert (tmp_path / "calibration.png").stat().st_size > 10_000
