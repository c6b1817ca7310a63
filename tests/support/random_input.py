"""Random prompts and guidance objects, for tests that compare with the reference."""

import random
from collections.abc import Sequence
from typing import Any

from tests.support.tiny import VOCABULARY


def random_prompts(rng: random.Random, count: int, shortest: int = 1, longest: int = 90) -> list[list[int]]:
    """Prompts of which about half begin like an earlier one, so that prefixes are found again."""
    prompts: list[list[int]] = []
    for _ in range(count):
        start = rng.choice(prompts)[: rng.randrange(longest)] if prompts and rng.random() < 0.5 else []
        length = rng.randint(shortest, longest)
        prompts.append((start + [rng.randrange(2, VOCABULARY - 8) for _ in range(length)])[:length])
    return prompts


def random_guidance(rng: random.Random, models: Sequence[str] = ("first", "second")) -> dict[str, Any]:
    """Any reward guidance that the reference knows."""
    strength = {"beta": round(rng.uniform(0.2, 3), 3), "top_k": rng.choice([1, 3, 10, 10, 17])}
    if rng.random() < 0.3:
        transform = rng.choice(
            [
                {"transform": "log_sigmoid", "reference": 0.3},
                {"transform": "affine", "scale": -0.7, "shift": 2.0},
                {},
            ]
        )
        first = {"model": models[0], "weight": round(rng.uniform(-1, 2), 3)}
        return {"method": "pargs", "rewards": [first, {"model": models[1], **transform}], **strength}
    method = rng.choice(["pargs", "args"])
    return {"method": method, "reward_model": rng.choice(models), "end_token": rng.random() < 0.3, **strength}


def random_policy_guidance(rng: random.Random) -> dict[str, Any]:
    """Any guidance by the policies "expert", "other" and "tilted" (a head) that the reference knows, gates and budgets
    included."""
    policy = rng.choice(["expert", "other", "tilted"])
    estimator = rng.choice([{}, {}, {"estimator": "monte_carlo", "samples": 500}])
    choices: list[dict[str, Any]] = [
        {"method": "mixed", "policy": policy, "mix": rng.choice([0.0, 0.3, 1.0, 1.7])},
        {"method": "mixed", "policy": policy, "mix": 0.8, "gate": random_gate(rng)},
        {"method": "length_control", "policy": policy, "length": rng.randint(1, 12)},
        {"method": "kl_threshold", "policy": policy, "threshold": round(rng.uniform(0.1, 2), 2), **estimator},
        {"method": "kl_threshold", "policy": policy, "threshold": 1.0, "mix": 0.4},
        {"method": "product", "policies": {"base": 1.0, "expert": 0.8, "other": -0.5}},
        {"method": "product", "policies": {"base": 0.3, "expert": 0.4, "tilted": 0.7}},
        {"method": "product", "policies": {"expert": 0.6, "other": 0.5}, "kl_budget": round(rng.uniform(1, 9), 2)},
        {**random_guidance(rng), "policies": {"base": 0.4, policy: 0.6}},
        {**random_guidance(rng), "gate": random_gate(rng)},
        {**random_guidance(rng), "kl_budget": round(rng.uniform(4, 30), 2), "trace": True},
    ]
    return rng.choice(choices)


def any_guidance(rng: random.Random) -> dict[str, Any]:
    """By reward models of either kind or by policies."""
    if rng.random() < 0.25:
        return random_whole_guidance(rng)
    return random_guidance(rng) if rng.random() < 0.4 else random_policy_guidance(rng)


def random_whole_guidance(rng: random.Random) -> dict[str, Any]:
    """By reward models that have a reward for every token: "every" (a vocabulary model) and "atop" (a head)."""
    rewards = rng.choice(
        [
            [{"model": "every"}],
            [{"model": "atop"}],
            [{"model": "atop", "weight": 0.6}, {"model": "every", "weight": -0.5}],
            [{"model": "atop", "transform": "log_sigmoid", "reference": 0.2}],
        ]
    )
    strength = {"beta": round(rng.uniform(0.2, 2), 3), "top_k": rng.choice([7, None])}
    guidance = {"method": "pargs", "rewards": rewards, **strength}
    return guidance | rng.choice([{}, {}, {"gate": random_gate(rng)}, {"kl_budget": 12.0}])


def random_gate(rng: random.Random) -> dict[str, Any]:
    """One condition or two."""
    conditions = [
        {"first_tokens": rng.randint(1, 12)},
        {"entropy_above": round(rng.uniform(1.0, 4.0), 2)},
        {"kl_above": round(rng.uniform(0.1, 2), 2), "policy": rng.choice(["expert", "other", "tilted"])},
    ]
    chosen = rng.sample(conditions, rng.choice([1, 1, 2]))
    return {key: value for condition in chosen for key, value in condition.items()}
