"""What measured answers are compared by: means with standard errors, paired tests, curves, diversity."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean over independent values and its standard error, which is NaN for a single value."""

    mean: float
    standard_error: float
    count: int

    @property
    def verdict(self) -> int:
        """1 or -1 where the mean is above or below 0 at the 5 % level (two-sided t-test), else 0."""
        if self.count < 2 or not abs(self.mean) > stats.t.ppf(0.975, self.count - 1) * self.standard_error:
            return 0
        return 1 if self.mean > 0 else -1

    def dump(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        error = None if math.isnan(self.standard_error) else self.standard_error
        return {"mean": self.mean, "standard_error": error, "count": self.count}

    def __format__(self, form: str) -> str:
        error = "" if math.isnan(self.standard_error) else f" ± {format(self.standard_error, form.lstrip('+'))}"
        return format(self.mean, form) + error


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error s/√n of at least one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(statistics.fmean(values), error, len(values))


def wilcoxon(better: Sequence[float], worse: Sequence[float]) -> float:
    """p-value of the one-sided signed-rank test that `better` exceeds `worse`, the n-th of both at the same prompt."""
    differences = [a - b for a, b in zip(better, worse, strict=True)]
    return float(stats.wilcoxon(differences, alternative="greater").pvalue) if any(differences) else 1.0


def height_over_curve(point: tuple[float, float], curve: Sequence[tuple[float, float]]) -> float | None:
    """How far a point (x, y) lies above a curve's straight-line interpolation at the same x; None outside its range."""
    xs, ys = zip(*sorted(curve), strict=True)
    x, y = point
    return y - float(np.interp(x, xs, ys)) if xs[0] <= x <= xs[-1] else None


def rouge_l(one: Sequence[str], two: Sequence[str]) -> float:
    """ROUGE-L F1 of two texts as words: the longest common subsequence over their mean length (Lin 2004, β = 1)."""
    if not one or not two:
        return 1.0 if len(one) == len(two) else 0.0
    lengths = [0] * (len(two) + 1)
    for word in one:
        diagonal = 0
        for n, other in enumerate(two, start=1):
            diagonal, lengths[n] = lengths[n], diagonal + 1 if word == other else max(lengths[n], lengths[n - 1])
    return 2 * lengths[-1] / (len(one) + len(two))


def self_similarity(texts: Sequence[str]) -> float:
    """Mean ROUGE-L F1 over all pairs of at least two texts: 1 where they are alike, lower the more they differ."""
    words = [text.split() for text in texts]
    return statistics.fmean(rouge_l(a, b) for a, b in itertools.combinations(words, 2))
