"""The reference itself, against the papers' formulas written out by hand over random numbers."""

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from steersman.guidance.reference import (
    ReferenceModels,
    ReferenceStep,
    reference_greedy,
    reference_kl,
    reference_replay,
    reference_step,
    transform,
)
from steersman.guidance.request import Reward, parse_guidance

WIDTH, END = 12, 1
PREFIX = [3, 4]
PARGS = {"method": "pargs", "reward_model": "a", "beta": 0.7, "top_k": 5}


class World:
    """Numbers that depend on the tokens alone: logits of three models and rewards of two."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.models = ReferenceModels(
            lambda tokens: self.draw("base", tokens),
            END,
            {name: lambda texts, name=name: torch.stack([self.reward(name, t) for t in texts]) for name in "ab"},
            {name: lambda tokens, name=name: 2 * self.draw(name, tokens) for name in "pq"},
        )
        self.read: list[list[int]] = []

    def draw(self, name: str, tokens: Sequence[int], width: int = WIDTH) -> torch.Tensor:
        generator = torch.Generator().manual_seed(random.Random(f"{self._seed}/{name}/{list(tokens)}").getrandbits(60))
        return torch.randn(width, generator=generator)

    def reward(self, name: str, text: Sequence[int]) -> torch.Tensor:
        self.read.append(list(text))
        return self.draw(name, text, 1)[0]

    def step(self, guidance: dict[str, Any], position: int = 0, spent: float = 0.0) -> ReferenceStep:
        return reference_step(PREFIX, parse_guidance(guidance), self.models, position, spent)  # type: ignore[arg-type]

    def logprobs(self, name: str) -> list[float]:
        """log π by hand."""
        logits = (self.models.base if name == "base" else self.models.policies[name])(PREFIX).double().tolist()
        total = math.log(sum(map(math.exp, logits)))
        return [value - total for value in logits]

    def kl(self, name: str) -> float:
        return sum(math.exp(p) * (p - q) for p, q in zip(self.logprobs(name), self.logprobs("base"), strict=True))

    def entropy(self) -> float:
        return -sum(math.exp(q) * q for q in self.logprobs("base"))


@pytest.fixture
def world(rng: random.Random) -> World:
    return World(rng.randrange(2**31))


def assert_step(step: ReferenceStep, scores: dict[int, float]) -> None:
    """log π is `scores` up to a constant on their tokens, and -inf elsewhere."""
    total = math.log(sum(map(math.exp, scores.values())))
    expected = [scores[v] - total if v in scores else -math.inf for v in range(WIDTH)]
    assert step.logprobs.tolist() == pytest.approx(expected, abs=1e-9)


def squash(value: float) -> float:
    return -math.log(1 + math.exp(-value))


@pytest.mark.parametrize("end_token", [False, True])
@pytest.mark.parametrize("top_k", [1, 5, None])
def test_rewards_are_added_to_the_bases_best_tokens(world: World, top_k: int | None, end_token: bool) -> None:
    step = world.step({**PARGS, "top_k": top_k, "end_token": end_token})
    base = world.logprobs("base")
    best = sorted(range(WIDTH), key=lambda v: -base[v])[: top_k or WIDTH]
    suffix = [END] if end_token else []
    assert world.read == [[*PREFIX, v, *suffix] for v in best]
    rewards = {v: float(world.reward("a", [*PREFIX, v, *suffix])) for v in best}
    assert_step(step, {v: base[v] + 0.7 * rewards[v] for v in best})
    assert (step.candidates, step.guided) == (best, True)
    assert step.rewards["a"].tolist() == pytest.approx(list(rewards.values()))
    assert step.base_logprobs.tolist() == pytest.approx(base, abs=1e-9)


def test_each_reward_has_its_weight_and_its_transform(world: World) -> None:
    terms = [
        {"model": "a", "weight": 2.0, "transform": "log_sigmoid", "reference": 0.3},
        {"model": "b", "weight": -0.5, "transform": "affine", "scale": 1.5, "shift": 7.0},
    ]
    step = world.step(
        {"method": "pargs", "rewards": terms, "beta": 0.9, "top_k": 4, "policies": {"base": 0.4, "p": 0.8}}
    )
    base, policy = world.logprobs("base"), world.logprobs("p")
    scores = {}
    for v in step.candidates:
        first, second = (float(world.reward(name, [*PREFIX, v])) for name in "ab")
        bonus = 2.0 * squash(first - 0.3) - 0.5 * (1.5 * second + 7.0)
        scores[v] = 0.4 * base[v] + 0.8 * policy[v] + 0.9 * bonus
    assert_step(step, scores)
    assert set(step.candidates) == set(sorted(range(WIDTH), key=lambda v: -base[v])[:4]), "the base's best"
    plain = world.step(
        {"method": "pargs", "rewards": [{"model": "a", "transform": "identity"}], "beta": 0.9, "top_k": 4}
    )
    assert_step(plain, {v: base[v] + 0.9 * float(world.reward("a", [*PREFIX, v])) for v in plain.candidates})


def test_a_transform_is_affine_or_a_log_sigmoid(rng: random.Random) -> None:
    raw = [rng.gauss(0, 2) for _ in range(4)]
    for given, expected in (
        ({}, raw),
        ({"transform": "affine", "scale": -1.5, "shift": 0.7}, [-1.5 * r + 0.7 for r in raw]),
        ({"transform": "log_sigmoid", "reference": 0.3}, [squash(r - 0.3) for r in raw]),
    ):
        found = transform(torch.tensor(raw, dtype=torch.float64), Reward(model="a", **given))
        assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("guidance", "weights", "guided"),
    [
        ({"method": "mixed", "policy": "p", "mix": 0.3}, {"base": 0.7, "p": 0.3}, True),
        ({"method": "mixed", "policy": "p", "mix": 1.7}, {"base": -0.7, "p": 1.7}, True),
        ({"method": "mixed", "policy": "p", "mix": 0.0}, {"base": 1.0}, False),
        (
            {"method": "product", "policies": {"base": 0.5, "p": 0.9, "q": -0.3}},
            {"base": 0.5, "p": 0.9, "q": -0.3},
            True,
        ),
        ({"method": "product", "policies": {"p": 0.9, "q": 0.0}}, {"p": 0.9}, True),
        ({"method": "product", "policies": {"base": 1.0, "p": 0.0}}, {"base": 1.0}, False),
        ({"method": "product", "policies": {"base": 0.5, "p": 0.0}}, {"base": 0.5}, True),
    ],
    ids=str,
)
def test_policies_are_multiplied_with_their_powers(
    world: World, guidance: dict[str, Any], weights: dict[str, float], guided: bool
) -> None:
    step = world.step(guidance)
    own = {name: world.logprobs(name) for name in weights}
    assert_step(step, {v: sum(c * own[name][v] for name, c in weights.items()) for v in range(WIDTH)})
    assert step.guided is guided
    assert step.doubt == math.inf


def test_a_policy_without_a_coefficient_is_not_read(world: World) -> None:
    def never(tokens: Sequence[int]) -> torch.Tensor:
        raise AssertionError("the policy is read")

    models = ReferenceModels(world.models.base, END, {}, {"p": world.models.policies["p"], "q": never})
    guidance: Any = parse_guidance({"method": "product", "policies": {"p": 0.9, "q": 0.0}})
    assert reference_step(PREFIX, guidance, models).guided


def test_a_token_that_the_base_masks_is_possible_nowhere(world: World) -> None:
    base = world.draw("base", PREFIX)
    base[2:11] = -torch.inf
    models = ReferenceModels(lambda _: base, END, world.models.rewards, world.models.policies)
    for guidance in (
        PARGS,
        {"method": "mixed", "policy": "p", "mix": 0.5},
        {"method": "product", "policies": {"p": 1}},
    ):
        step = reference_step(PREFIX, parse_guidance({**guidance}), models)  # type: ignore[arg-type]
        assert step.logprobs[2:11].isneginf().all()
        assert float(step.logprobs.exp().sum()) == pytest.approx(1.0)
    budgeted = {"method": "mixed", "policy": "p", "mix": 1.0, "kl_budget": 0.1}
    step = reference_step(PREFIX, parse_guidance(budgeted), models)  # type: ignore[arg-type]
    assert step.kl_steering == pytest.approx(0.1 / 8, rel=1e-6)


def test_length_control_ends_behind_its_last_token(world: World) -> None:
    guidance = {"method": "length_control", "policy": "p", "length": 3}
    first: Any = parse_guidance({**guidance, "length": 1})
    assert reference_step(PREFIX, first, world.models).guided, "the first token, unless another is given"
    for position, opens in ((0, True), (2, True), (3, False), (4, False)):
        step = world.step(guidance, position)
        assert step.guided is opens
        assert_step(step, dict(enumerate(world.logprobs("p" if opens else "base"))))


@pytest.mark.parametrize("mix", [0.0, 0.4])
def test_a_threshold_is_passed_by_a_larger_kl(world: World, mix: float) -> None:
    kl, base, policy = world.kl("p"), world.logprobs("base"), world.logprobs("p")
    for factor in (0.9, 1.1):
        step = world.step({"method": "kl_threshold", "policy": "p", "threshold": factor * kl, "mix": mix})
        share = 1.0 if factor < 1 else mix
        assert_step(step, {v: share * policy[v] + (1 - share) * base[v] for v in range(WIDTH)})
        assert step.guided is (share > 0)
        if share != 0.4:
            assert step.doubt == pytest.approx(0.1 * kl)


def test_all_conditions_of_a_gate_must_hold_and_the_closest_is_the_doubt(world: World) -> None:
    kl, entropy = world.kl("q"), world.entropy()
    mixed = {"method": "mixed", "policy": "p", "mix": 0.5}
    for first, above, over in ((3, 0.9, 0.8), (2, 0.9, 0.8), (3, 1.1, 0.8), (3, 0.9, 1.2)):
        gate = {"first_tokens": first, "entropy_above": above * entropy, "kl_above": over * kl, "policy": "q"}
        step = world.step({**mixed, "gate": gate}, position=2)
        assert step.guided is (first == 3 and above < 1 and over < 1)
        assert step.doubt == pytest.approx(min(0.1 * entropy, 0.2 * kl))
    assert world.step({**mixed, "gate": {"first_tokens": 2}}).doubt == math.inf


def test_a_gate_reads_the_methods_own_policy_unless_another_is_named(world: World) -> None:
    mixed = {"method": "mixed", "policy": "p", "mix": 0.5}
    rewards = {**PARGS, "policies": {"base": 0.5, "p": 0.5}}
    for guidance in (mixed, rewards):
        assert world.step({**guidance, "gate": {"kl_above": 0.0}}).doubt == pytest.approx(world.kl("p"))
        assert world.step({**guidance, "gate": {"kl_above": 0.0, "policy": "q"}}).doubt == pytest.approx(world.kl("q"))


def test_a_budget_leaves_a_position_an_eighth_of_what_is_left(world: World) -> None:
    guidance = {"method": "mixed", "policy": "p", "mix": 1.0}
    kl, base, policy = world.kl("p"), world.logprobs("base"), world.logprobs("p")
    free = world.step({**guidance, "kl_budget": 8.1 * kl + 1.0}, spent=1.0)
    assert_step(free, dict(enumerate(policy)))
    step = world.step({**guidance, "kl_budget": 4 * kl + 1.0}, spent=1.0)
    assert step.kl_steering == pytest.approx(kl / 2, rel=1e-6)
    change = [own - b for own, b in zip(step.logprobs.tolist(), base, strict=True)]
    whole = [p - b for p, b in zip(policy, base, strict=True)]
    strength = (change[0] - change[1]) / (whole[0] - whole[1])
    assert 0 < strength < 1
    assert_step(step, {v: base[v] + strength * whole[v] for v in range(WIDTH)})
    spent = world.step({**guidance, "kl_budget": 1.0}, spent=1.0)
    assert not spent.guided
    assert_step(spent, dict(enumerate(base)))
    assert world.step({**guidance, "kl_budget": 1.0}, spent=1.0 - 1e-5).guided


def test_what_a_step_costs_is_of_its_support_and_of_steering(world: World) -> None:
    step, base = world.step(PARGS), world.logprobs("base")
    mass = sum(math.exp(base[v]) for v in step.candidates)
    assert step.kl_truncation == pytest.approx(-math.log(mass))
    chosen = [float(step.logprobs[v]) for v in step.candidates]
    whole = sum(math.exp(p) * (p - base[v]) for p, v in zip(chosen, step.candidates, strict=True))
    assert step.kl_steering == pytest.approx(whole + math.log(mass))
    assert step.margin == pytest.approx(sorted(chosen)[-1] - sorted(chosen)[-2])
    assert world.step({**PARGS, "beta": 0.0}).kl_steering == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("limit", [1, 30])
def test_the_best_token_is_taken_until_the_end(world: World, rng: random.Random, limit: int) -> None:
    prompt = [rng.randrange(2, WIDTH) for _ in range(3)]
    guidance: Any = parse_guidance({**PARGS, "top_k": WIDTH, "kl_budget": 1.0, "gate": {"first_tokens": 5}})
    answer, steps = reference_greedy(prompt, guidance, world.models, limit)
    assert len(answer) == len(steps) <= limit
    assert len(answer) == limit or answer[-1] == END
    assert END not in answer[:-1]
    spent = 0.0
    for n, (token, step) in enumerate(zip(answer, steps, strict=True)):
        expected = reference_step([*prompt, *answer[:n]], guidance, world.models, n, spent)
        assert torch.equal(step.logprobs, expected.logprobs)
        assert token == int(step.logprobs.argmax())
        assert step.kl_steering <= (1.0 - spent) / 8 + 1e-9
        spent += step.kl_steering
    replayed = reference_replay(prompt, answer, guidance, world.models)
    assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(steps, replayed, strict=True))
    expected_kl = sum(float(s.logprobs[v]) - float(s.base_logprobs[v]) for s, v in zip(steps, answer, strict=True))
    assert reference_kl(steps, answer) == pytest.approx(expected_kl)
