"""A request compiled to numbers: terms, coefficients, gate, and which models it names."""

import random
from typing import Any

import pytest

from steersman.guidance.plan import Formula, Gate, KLCondition, PolicyTerm, RewardTerm, Transform
from tests.support.oracle import plan_of

REWARDS = {"method": "pargs", "reward_model": "a", "top_k": 7, "beta": 0.5}


def test_rewards_are_terms_over_the_base_or_a_mixture() -> None:
    formula = plan_of(REWARDS).formula
    assert (formula.base, formula.policies, formula.beta, formula.top_k, formula.end_token) == (1.0, (), 0.5, 7, False)
    assert formula.rewards == (RewardTerm("a", 1.0, Transform.AFFINE, 1.0, 0.0),)
    over = plan_of({**REWARDS, "policies": {"base": 0.25, "p": 0.75}, "end_token": True}).formula
    assert (over.base, over.policies, over.end_token) == (0.25, (PolicyTerm("p", 0.75),), True)
    assert over.rewards == formula.rewards


def test_each_transform_becomes_a_scale_and_a_shift() -> None:
    squashed = {"model": "a", "weight": 2.0, "transform": "log_sigmoid", "reference": 0.3}
    scaled = {"model": "b", "weight": -1.0, "transform": "affine", "scale": 4.0, "shift": 5.0}
    assert plan_of({"method": "pargs", "rewards": [squashed, scaled]}).formula.rewards == (
        RewardTerm("a", 2.0, Transform.LOG_SIGMOID, 1.0, -0.3),
        RewardTerm("b", -1.0, Transform.AFFINE, 4.0, 5.0),
    )


@pytest.mark.parametrize(
    ("guidance", "base", "policies"),
    [
        ({"method": "mixed", "policy": "p", "mix": 0.25}, 0.75, {"p": 0.25}),
        ({"method": "mixed", "policy": "p", "mix": 1.5}, -0.5, {"p": 1.5}),
        ({"method": "mixed", "policy": "p", "mix": 0.0}, 1.0, {}),
        ({"method": "product", "policies": {"p": 0.5, "q": -0.5}}, 0.0, {"p": 0.5, "q": -0.5}),
        ({"method": "product", "policies": {"base": 2.0, "p": 0.0, "q": 0.1}}, 2.0, {"q": 0.1}),
        ({"method": "length_control", "policy": "p", "length": 3}, 0.0, {"p": 1.0}),
        ({"method": "kl_threshold", "policy": "p", "threshold": 1.0}, 0.0, {"p": 1.0}),
    ],
    ids=str,
)
def test_a_method_over_policies_is_a_product_of_their_powers(
    guidance: dict[str, Any], base: float, policies: dict[str, float]
) -> None:
    plan = plan_of(guidance)
    expected = tuple(PolicyTerm(name, coefficient) for name, coefficient in policies.items())
    assert (plan.formula.base, plan.formula.policies, plan.formula.rewards) == (base, expected, ())
    assert plan.method == guidance["method"]
    assert plan.below.is_base
    assert plan.formula.is_base is (not policies)


def test_a_mixture_may_stand_below_a_threshold() -> None:
    plan = plan_of({"method": "kl_threshold", "policy": "p", "threshold": 1.0, "mix": 0.3})
    assert plan.below == Formula(base=0.7, policies=(PolicyTerm("p", 0.3),))


def test_conditions_become_one_gate() -> None:
    assert plan_of(REWARDS).gate == Gate()
    assert plan_of({"method": "length_control", "policy": "p", "length": 4}).gate == Gate(first_tokens=4)
    threshold = {"method": "kl_threshold", "policy": "p", "threshold": 0.5}
    assert plan_of(threshold).gate == Gate(kl=KLCondition("p", 0.5, 0))
    drawn = {**threshold, "estimator": "monte_carlo", "samples": 50}
    assert plan_of(drawn).gate == Gate(kl=KLCondition("p", 0.5, 50))
    gate = {"first_tokens": 3, "entropy_above": 1.5, "kl_above": 0.2, "policy": "q"}
    assert plan_of({**REWARDS, "gate": gate}).gate == Gate(3, 1.5, KLCondition("q", 0.2, 0))
    gate = {"kl_above": 0.2, "estimator": "monte_carlo", "samples": 9}
    mixed = {"method": "mixed", "policy": "p", "mix": 0.5}
    assert plan_of({**mixed, "gate": gate}).gate == Gate(kl=KLCondition("p", 0.2, 9)), "the method's own policy"


def test_models_are_named_once_the_gates_policy_among_them() -> None:
    both = [{"model": "a"}, {"model": "b"}]
    plan = plan_of({"method": "pargs", "rewards": both, "policies": {"base": 1.0, "p": 0.5}, "gate": {"kl_above": 1.0}})
    assert (plan.reward_models, plan.policies, plan.models) == (("a", "b"), ("p",), ("a", "b", "p"))
    plan = plan_of({"method": "mixed", "policy": "p", "mix": 0.5, "gate": {"kl_above": 1.0, "policy": "q"}})
    assert (plan.reward_models, plan.models) == ((), ("p", "q"))
    plan = plan_of({"method": "kl_threshold", "policy": "p", "threshold": 1.0, "mix": 0.3})
    assert plan.models == ("p",)


def test_only_a_formula_without_gate_or_budget_applies_everywhere() -> None:
    assert plan_of(REWARDS).always_open
    assert not plan_of({**REWARDS, "gate": {"first_tokens": 3}}).always_open
    assert not plan_of({**REWARDS, "kl_budget": 3.0}).always_open
    assert not plan_of({"method": "mixed", "policy": "p", "mix": 0.0}).always_open


def test_budget_and_trace_are_kept() -> None:
    plan = plan_of({**REWARDS, "kl_budget": 3.0, "trace": True})
    assert (plan.kl_budget, plan.trace) == (3.0, True)
    assert (plan_of(REWARDS).kl_budget, plan_of(REWARDS).trace) == (None, False)


def test_the_tokens_of_a_step_are_the_last_one_and_the_candidates_with_their_end_tokens(rng: random.Random) -> None:
    top_k = rng.randint(1, 30)
    assert plan_of({**REWARDS, "top_k": top_k}).formula.tokens_per_step == 1 + top_k
    assert plan_of({**REWARDS, "top_k": top_k, "end_token": True}).formula.tokens_per_step == 1 + 2 * top_k


def test_the_support_is_the_top_k_only_where_rewards_have_one() -> None:
    assert plan_of({**REWARDS, "top_k": 1}).formula.has_candidates
    assert not plan_of({**REWARDS, "top_k": None}).formula.has_candidates
    assert plan_of({**REWARDS, "top_k": None}).formula.top_k == 0
    assert not plan_of({"method": "mixed", "policy": "p", "mix": 0.5}).formula.has_candidates
    assert not plan_of(REWARDS).formula.is_base
    assert not Formula(top_k=5).has_candidates


def test_a_formula_is_the_base_only_without_any_term() -> None:
    assert Formula().is_base
    assert Formula() == Formula(base=1.0, policies=(), rewards=(), beta=0.0, top_k=0, end_token=False)
    assert not Formula(base=0.5).is_base
    assert not Formula(policies=(PolicyTerm("p", 0.5),)).is_base
    assert not Formula(rewards=plan_of(REWARDS).formula.rewards).is_base
