"""Conditions of a gate: what is decided without a model, which models an open position needs, and on which side of a
threshold a row falls."""

import math
import random
from typing import Any

import pytest
import torch

from steersman.guidance.gates import (
    can_defer,
    certain_readers,
    choose_seed,
    closed_by_kl,
    may_open,
    open_by_entropy,
)
from steersman.guidance.readings import Readings
from steersman.guidance.rows import GuidedRequest, Row
from steersman.kernels.arguments import LARGEST_SAMPLE
from tests.support.oracle import plan_of

WIDTH = 16
MIXED = {"method": "mixed", "policy": "p", "mix": 0.5}
REWARDS = {"method": "pargs", "reward_model": "a"}


def row_of(guidance: dict[str, Any], index: int = 0, position: int = 0, seed: int = 0) -> Row:
    request = GuidedRequest(index, plan_of(guidance), 2, seed)
    return Row(index, request, [5, 6], [7] * position)


def test_a_gate_on_the_position_closes_behind_its_last_token(rng: random.Random) -> None:
    first = rng.randint(1, 9)
    gated = {**REWARDS, "gate": {"first_tokens": first}}
    assert [may_open(row_of(gated, position=n)) for n in (0, first - 1, first, first + 1)] == [True, True, False, False]
    assert may_open(row_of(REWARDS, position=10_000))


def test_nothing_opens_once_the_budget_is_spent() -> None:
    row = row_of({**REWARDS, "kl_budget": 2.0})
    for spent, opens in (
        ([], True),
        ([1.0, 0.5], True),
        ([1.0, 1.0 - 2e-6], True),
        ([1.0, 1.0], False),
        ([3.0], False),
    ):
        row.request.spent = spent
        assert may_open(row) is opens, spent


def test_a_formula_that_is_the_base_on_both_sides_never_opens() -> None:
    assert not may_open(row_of({**MIXED, "mix": 0.0}))
    below = {"method": "kl_threshold", "policy": "p", "threshold": 1.0}
    assert may_open(row_of(below))
    assert may_open(row_of({**below, "mix": 0.5}))


def test_models_behind_an_undecided_gate_are_not_read_ahead() -> None:
    both = {**REWARDS, "policies": {"p": 0.5, "q": 0.5}}
    assert certain_readers(plan_of(both)) == ("p", "q", "a")
    assert certain_readers(plan_of({**both, "gate": {"first_tokens": 3}})) == ("p", "q", "a")
    assert certain_readers(plan_of({**both, "gate": {"kl_above": 1.0, "policy": "q"}})) == ("q",)
    assert certain_readers(plan_of({**both, "gate": {"kl_above": 1.0, "policy": "q", "entropy_above": 1.0}})) == ()


def test_a_kernel_decides_only_where_no_other_model_would_be_spared() -> None:
    threshold = {"method": "kl_threshold", "policy": "p", "threshold": 1.0}
    assert can_defer(plan_of(threshold))
    assert can_defer(plan_of({**MIXED, "gate": {"kl_above": 1.0}}))
    assert not can_defer(plan_of(MIXED)), "there is no condition"
    assert not can_defer(plan_of({**threshold, "kl_budget": 5.0}))
    assert not can_defer(plan_of({**REWARDS, "gate": {"kl_above": 1.0, "policy": "p"}}))
    assert not can_defer(plan_of({**MIXED, "gate": {"kl_above": 1.0, "policy": "q"}}))
    for samples, defers in ((LARGEST_SAMPLE, True), (LARGEST_SAMPLE + 1, False)):
        drawn = {**threshold, "estimator": "monte_carlo", "samples": samples}
        assert can_defer(plan_of(drawn)) is defers


def test_rows_open_above_their_own_entropy_and_those_without_a_condition_always(rng: random.Random) -> None:
    logits = 2 * torch.randn(4, WIDTH)
    logits[3] = 0.0
    entropies = [float(-(line.log_softmax(-1).exp() * line.log_softmax(-1)).sum()) for line in logits.double()]
    above = [entropies[0] - 1e-3, entropies[1] + 1e-3, None, 0.0]
    rows = [
        row_of({**REWARDS, "gate": {"first_tokens": 9} if value is None else {"entropy_above": value}}, n)
        for n, value in enumerate(above)
    ]
    assert [row.index for row in open_by_entropy(logits, rows)] == [0, 2, 3]
    assert [row.index for row in open_by_entropy(logits, [rows[2], rows[1]])] == [2]
    assert open_by_entropy(logits, rows[2:3]) == rows[2:3]


def test_an_entropy_at_its_threshold_is_not_above_it() -> None:
    certain = torch.full((1, WIDTH), -torch.inf)
    certain[0, 3] = 0.0
    assert open_by_entropy(certain, [row_of({**REWARDS, "gate": {"entropy_above": 0.0}})]) == []


@pytest.mark.parametrize("samples", [0, 4000])
def test_rows_close_whose_kl_is_not_above_their_own_threshold(rng: random.Random, samples: int) -> None:
    base, policies = torch.randn(4, WIDTH), {name: torch.randn(4, WIDTH) for name in "pq"}
    names = ["p", "q", "p", "p"]
    kl = []
    for n, name in enumerate(names):
        p, q = policies[name][n].double().log_softmax(-1), base[n].double().log_softmax(-1)
        kl.append(float((p.exp() * (p - q)).sum()))
    doubt = 0.3 if samples else 1e-4
    estimator = {"estimator": "monte_carlo", "samples": samples} if samples else {}
    thresholds = [max(0.0, kl[0] - doubt), kl[1] + doubt, kl[2] + doubt]
    rows = [
        row_of({"method": "kl_threshold", "policy": name, "threshold": threshold, **estimator}, n, seed=n)
        for n, (name, threshold) in enumerate(zip(names, thresholds, strict=False))
    ]
    rows.append(row_of(MIXED, 3))
    readings = Readings(WIDTH)
    for name in "pq":
        mine = [row for row, own in zip(rows, names, strict=True) if own == name]
        readings.add(name, mine, policies[name][[row.index for row in mine]])
    assert closed_by_kl(base, rows, readings) == {1, 2}


def test_a_kl_that_is_not_a_number_or_at_its_threshold_closes_the_gate(rng: random.Random) -> None:
    base = torch.randn(2, WIDTH)
    policy = base.clone()
    policy[0, 3] = math.nan
    rows = [row_of({"method": "kl_threshold", "policy": "p", "threshold": 0.0}, n) for n in (0, 1)]
    readings = Readings(WIDTH)
    readings.add("p", rows, policy)
    assert closed_by_kl(base, rows, readings) == {0, 1}


def test_samples_are_drawn_anew_at_every_position_and_alike_when_it_is_scored_again(rng: random.Random) -> None:
    seed = rng.randrange(2**31)
    drawn = [choose_seed(row_of(MIXED, position=n, seed=seed)) for n in range(50)]
    assert len(set(drawn)) == 50
    assert [choose_seed(row_of(MIXED, index=3, position=n, seed=seed)) for n in range(50)] == drawn
    assert not set(drawn) & {choose_seed(row_of(MIXED, position=n, seed=seed + 1)) for n in range(50)}
    assert all(0 <= value < 2**63 for value in drawn)
    assert any(value >= 2**61 for value in drawn)
