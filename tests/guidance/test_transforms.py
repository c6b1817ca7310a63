"""Rewards are transformed, weighted and added up row by row as the formula says."""

import math
import random

import pytest
import torch

from steersman.guidance.transforms import build_combination
from tests.support.oracle import plan_of


def test_a_kernel_gets_the_terms_of_every_row_and_weight_0_where_a_row_has_fewer() -> None:
    squashed = {"model": "a", "transform": "log_sigmoid", "reference": 0.3, "weight": 2.0}
    scaled = {"model": "b", "transform": "affine", "scale": -0.5, "shift": 7.0}
    guidances = [{"rewards": [squashed, scaled], "beta": 1.5}, {"rewards": [{"model": "b"}], "beta": 0.25}]
    formulas = [plan_of({"method": "pargs", **guidance}).formula for guidance in guidances]
    terms = build_combination(formulas, torch.device("cpu")).terms
    assert terms.strength.tolist() == [[3.0, 1.5], [0.25, 0.0]]
    assert terms.scale.tolist() == [[1.0, -0.5], [1.0, 0.0]]
    assert terms.shift.tolist() == [[pytest.approx(-0.3), 0.0], [0.0, 0.0]]
    assert terms.log_sigmoid.tolist() == [[1, 0], [0, 0]]
    plain = build_combination(formulas[1:], torch.device("cpu")).terms
    assert plain.log_sigmoid.tolist() == [[0]]


def _random_plan(rng: random.Random, terms: int) -> dict:
    rewards = []
    for n in range(terms):
        term: dict = {
            "model": str(n),
            "weight": rng.uniform(-2, 2),
            "transform": rng.choice(["identity", "affine", "log_sigmoid"]),
        }
        if term["transform"] == "affine":
            term |= {"scale": rng.uniform(-2, 2), "shift": rng.uniform(-2, 2)}
        if term["transform"] == "log_sigmoid":
            term |= {"reference": rng.uniform(-2, 2)}
        rewards.append(term)
    return {"method": "pargs", "rewards": rewards, "beta": rng.uniform(0, 3)}


def _by_hand(guidance: dict, rewards: list[float]) -> float:
    total = 0.0
    for term, r in zip(guidance["rewards"], rewards, strict=False):
        if term["transform"] == "affine":
            # The shift is the same for every candidate.
            r = term["scale"] * r
        elif term["transform"] == "log_sigmoid":
            r = -math.log1p(math.exp(-(r - term["reference"])))
        total += term["weight"] * r
    return guidance["beta"] * total


@pytest.mark.parametrize("most", [1, 3])
def test_rows_with_different_terms_share_one_batch(most: int) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    guidances = [_random_plan(rng, rng.randint(1, most)) for _ in range(20)]
    terms = max(len(g["rewards"]) for g in guidances)
    rewards = torch.full((20, terms, 5), torch.nan)
    for n, guidance in enumerate(guidances):
        rewards[n, : len(guidance["rewards"])] = torch.randn(len(guidance["rewards"]), 5)
    combined = build_combination([plan_of(g).formula for g in guidances], torch.device("cpu")).combine(rewards)
    expected = [[_by_hand(g, rewards[n, :, v].tolist()) for v in range(5)] for n, g in enumerate(guidances)]
    torch.testing.assert_close(combined, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 1.0, 2.5])
def test_a_batch_of_scales_alone_is_scaled(scale: float) -> None:
    rewards = [{"model": "a"}, {"model": "b", "transform": "affine", "scale": scale, "shift": 3.0, "weight": 0.5}]
    combination = build_combination([plan_of({"method": "pargs", "rewards": rewards}).formula], torch.device("cpu"))
    raw = torch.randn(1, 2, 4)
    torch.testing.assert_close(combination.combine(raw), raw[:, 0] + 0.5 * scale * raw[:, 1])
    assert combination.plain == (scale == 1.0), "an identity costs nothing"


def test_a_reward_that_is_not_a_number_is_not_hidden() -> None:
    plan = plan_of({"method": "pargs", "rewards": [{"model": "a"}, {"model": "b", "transform": "log_sigmoid"}]})
    rewards = torch.randn(1, 2, 3)
    rewards[0, 1, 2] = torch.nan
    combined = build_combination([plan.formula], torch.device("cpu")).combine(rewards)
    assert combined.isnan().tolist() == [[False, False, True]]
