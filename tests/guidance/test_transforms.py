"""Rewards are transformed, weighted and added up row by row as the formula says."""

import math
import random

import pytest
import torch

from steersman.guidance.transforms import build_combination, explain_broken
from steersman.guidance.work import Failure
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


@pytest.mark.parametrize("transforms", [["log_sigmoid"], ["identity", "log_sigmoid"], ["log_sigmoid"] * 2])
def test_a_batch_without_scales_is_squashed_all_the_same(rng: random.Random, transforms: list[str]) -> None:
    terms = [{"model": str(n), "weight": rng.uniform(-2, 2), "transform": t} for n, t in enumerate(transforms)]
    terms[-1]["reference"] = rng.uniform(-2, 2)
    guidance = {"method": "pargs", "rewards": terms, "beta": rng.uniform(0.1, 3)}
    rewards = torch.randn(1, len(terms), 5)
    combined = build_combination([plan_of(guidance).formula], torch.device("cpu")).combine(rewards)
    expected = [
        _by_hand({**guidance, "rewards": [{"reference": 0.0, **term} for term in terms]}, r)
        for r in rewards[0].T.tolist()
    ]
    torch.testing.assert_close(combined, torch.tensor([expected]), rtol=1e-5, atol=1e-5)


def test_rows_are_padded_only_where_one_has_fewer_terms() -> None:
    one, two = ({"method": "pargs", "rewards": [{"model": name} for name in names]} for names in ("a", "ab"))
    formulas = {"one": plan_of(one).formula, "two": plan_of(two).formula}
    for names, present in ((["one", "one"], None), (["two", "one"], [[True, True], [True, False]])):
        combination = build_combination([formulas[name] for name in names], torch.device("cpu"))
        assert (combination.present is None) == (present is None), "no term is missing"
        if combination.present is not None:
            assert combination.present.squeeze(-1).tolist() == present


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


POLICIES = {"base": 0.5, "p": 0.3, "q": 0.2}
BOTH = {"method": "pargs", "rewards": [{"model": "a"}, {"model": "b"}], "beta": 50.0, "top_k": 4}


@pytest.mark.parametrize(
    ("policies", "blamed", "reason"),
    [
        (POLICIES, "p", "each of the base's best 4 tokens has probability 0 under one of the policies 'p', 'q'"),
        (None, "a", "each of the base's best 4 tokens has probability 0 under the base itself"),
    ],
)
def test_a_row_without_support_is_the_fault_of_its_policies(
    policies: dict[str, float] | None, blamed: str, reason: str
) -> None:
    formula = plan_of({**BOTH, **({"policies": policies} if policies else {})}).formula
    failure = explain_broken(formula, torch.full((4,), -torch.inf), torch.randn(2, 4))
    assert failure == Failure(blamed, "raised", reason)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_reward_models_whose_rewards_are_not_finite_are_named(rng: random.Random, value: float) -> None:
    formula, values = plan_of(BOTH).formula, torch.randn(4)
    masked, shown = rng.sample(range(4), 2)
    values[masked] = -torch.inf
    for spoilt, named in ((["b"], "'b'"), (["a", "b"], "'a', 'b'")):
        rewards = torch.randn(2, 4)
        rewards[["ab".index(name) for name in spoilt], shown] = value
        # What a model returns for a token that is not in the support does not matter.
        rewards[0, masked] = math.nan
        reason = f"reward model {named} returned a reward that is not a finite number"
        assert explain_broken(formula, values, rewards) == Failure(spoilt[0], "not_finite", reason)


def test_finite_rewards_that_overflow_are_the_fault_of_the_largest(rng: random.Random) -> None:
    formula, values = plan_of(BOTH).formula, torch.randn(4)
    masked, shown = rng.sample(range(4), 2)
    values[masked] = -torch.inf
    for name, other in ("ab", "ba"):
        rewards = torch.randn(2, 4)
        rewards["ab".index(name), shown] = -1.5e37
        rewards["ab".index(other), masked] = 3e38
        failure = explain_broken(formula, values, rewards)
        assert (failure.model, failure.fault) == (name, "not_finite")
        assert (
            f"beta 50 times the weighted rewards is too large for float32: reward model '{name}' returned 1.5e+37"
            in (failure.reason)
        )
