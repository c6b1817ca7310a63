"""Rewards of prefixes held against the exact probabilities of an enumerable world."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from steersman.benchmarks.enumerable import World

BINS = 10

Rewards = list[np.ndarray]
"""For each cut of the world, the rewards of its prefixes, in their order."""


@dataclass(frozen=True)
class Calibration:
    """How far σ(reward difference) is from the exact P, over pairs of prefixes, each weighing what the base gives."""

    ece: float
    """Expected calibration error: mean over 10 bins of |mean σ − mean P|."""
    mean: float
    """Mean |σ − P|."""
    largest: float
    """Largest |σ − P| of any pair."""
    bins: list[tuple[float, float, float]]
    """Mean σ, mean P, and weight of each bin."""


def calibrate(predicted: np.ndarray, exact: np.ndarray, weights: np.ndarray) -> Calibration:
    """Of [n, m] predictions, the exact probabilities, and what each pair weighs."""
    weights, error = weights / weights.sum(), np.abs(predicted - exact)
    return _by_bins(predicted, exact, weights, float((weights * error).sum()), float(error.max()))


def average(parts: Sequence[Calibration]) -> Calibration:
    """Several calibrations as one, of which each is an equal share."""
    said, true, weights = np.array([one for part in parts for one in part.bins]).T
    mean = float(np.mean([part.mean for part in parts]))
    return _by_bins(said, true, weights / len(parts), mean, max(part.largest for part in parts))


def _by_bins(predicted: np.ndarray, exact: np.ndarray, weights: np.ndarray, mean: float, largest: float) -> Calibration:
    place = np.minimum((predicted * BINS).astype(int), BINS - 1)
    bins = []
    for n in range(BINS):
        inside = np.where(place == n, weights, 0.0)
        if total := float(inside.sum()):
            bins.append((float((inside * predicted).sum()) / total, float((inside * exact).sum()) / total, total))
    return Calibration(sum(abs(said - true) * total for said, true, total in bins), mean, largest, bins)


def compare(world: World, rewards: Rewards, cut: int, other: int, shift: bool = False) -> Calibration:
    """Calibration of prefixes cut at `cut` against those cut at `other`; with `shift` after the constant between the
    two cuts that makes the means equal."""
    difference = rewards[world.cuts.index(cut)][:, None] - rewards[world.cuts.index(other)]
    exact, weights = world.preferred(cut, other), np.outer(world.weights(cut), world.weights(other))
    if shift:
        difference = difference + brentq(
            lambda c: (weights * (expit(difference + c) - exact)).sum(), -30, 30, xtol=1e-4
        )
    return calibrate(expit(difference), exact, weights)


def correlate(one: np.ndarray, other: np.ndarray, weights: np.ndarray) -> float:
    """Correlation of two scores of the same prefixes, each weighing what the base gives it."""
    one, other = (values - np.average(values, weights=weights) for values in (one, other))
    return float((weights * one * other).sum() / np.sqrt((weights * one**2).sum() * (weights * other**2).sum()))


def correlate_unfinished(world: World, cut: int, one: np.ndarray, other: np.ndarray) -> float:
    """The same over the prefixes of a cut whose end token is still to come."""
    unfinished = world.unfinished(cut)
    return correlate(one[unfinished], other[unfinished], world.weights(cut)[unfinished])


def loss_of(world: World, rewards: np.ndarray) -> float:
    """The exact Bradley-Terry loss over pairs of whole answers: what a full model is trained to make small."""
    pairs, exact = np.outer(world.probability, world.probability), expit(world.gold[:, None] - world.gold)
    return float(2 * (pairs * exact * np.logaddexp(0.0, rewards - rewards[:, None])).sum())
