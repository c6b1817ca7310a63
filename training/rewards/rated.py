"""Objectives on whole responses that need more than which is chosen: their ratings, or how much better one is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from datasets import Dataset
from torch import Tensor

from steersman.training.data.preferences import TokenizedPreference
from steersman.training.rewards.losses import regression
from steersman.training.rewards.pairs import PairRewardTrainer, train_on, whole_rows
from steersman.training.rewards.recipe import Recipe, read_pairs_with

RATINGS = ("score_chosen", "score_rejected")
STRENGTH = ("strength",)


class RegressionTrainer(PairRewardTrainer):
    """Learns the rating of each response of a pair: L = mean (r − rating)² (HelpSteer2's regression)."""

    def _loss(self, chosen: Tensor, rejected: Tensor, score_chosen: Tensor, score_rejected: Tensor) -> Tensor:  # type: ignore[override]
        return regression(torch.cat((chosen, rejected)), torch.cat((score_chosen, score_rejected)))


def rated_rows(rows: Sequence[TokenizedPreference], columns: Sequence[str]) -> Dataset:
    """Whole pairs, with numbers of theirs."""
    dataset = whole_rows(rows)
    for name in columns:
        dataset = dataset.add_column(name, [float(getattr(row, name)) for row in rows])
    return dataset


REGRESSION = Recipe(
    seen="the ratings of whole responses",
    describe=lambda _: {"loss": "squared error of ratings"},
    make_trainer=train_on(lambda _arguments, rows, _seed: rated_rows(rows, RATINGS), RegressionTrainer, RATINGS),
    read=read_pairs_with(*RATINGS),
)
SCALED = Recipe(
    seen="whole responses and how much better the chosen one is",
    describe=lambda _: {"loss": "Bradley-Terry on whole responses, times strength (HelpSteer2-Preference)"},
    make_trainer=train_on(lambda _arguments, rows, _seed: rated_rows(rows, STRENGTH), columns=STRENGTH),
    read=read_pairs_with(*STRENGTH),
)
