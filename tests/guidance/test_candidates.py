"""Scores of the base's best candidates, over scripted rewards: which tokens stay possible and how likely they are, and
which row fails when a reward cannot be used."""

import math
import random
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from tests.support.gpu_runtime import acting_as_gpu
from tests.support.scripted import END, begin_rows, scripted_runtime

WIDTH = 24
GUIDED = {"method": "pargs", "reward_model": "a", "beta": 0.7, "top_k": WIDTH}


@pytest.fixture(params=["plain", "kernels"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a CPU, and as a GPU does it."""
    with acting_as_gpu() if request.param == "kernels" else nullcontext():
        yield


def expected_scores(base: torch.Tensor, bonus: torch.Tensor, support: list[int]) -> torch.Tensor:
    """Log-probabilities [V] of base + bonus on the support, and -inf elsewhere."""
    scores = torch.full((len(base),), -torch.inf, dtype=torch.float64)
    scores[support] = (base + bonus).double()[support]
    return scores.log_softmax(-1)


@pytest.mark.usefixtures("both_ways")
def test_every_row_keeps_its_own_top_k_weighed_by_its_own_rewards(rng: random.Random) -> None:
    rewards = {name: torch.randn(WIDTH) for name in "ab"}
    runtime, logits = scripted_runtime(rewards), torch.randn(4, WIDTH)
    wanted = [("a", 5, 0.7), ("b", 9, 2.0), ("a", 1, 1.0), ("b", WIDTH, 0.3)]
    guidances: list[dict[str, Any]] = [
        {"method": "pargs", "reward_model": name, "top_k": top_k, "beta": beta} for name, top_k, beta in wanted
    ]
    guided = logits.clone()
    runtime.step(guided, begin_rows(runtime, guidances))
    for row, base, (name, top_k, beta) in zip(guided, logits, wanted, strict=True):
        support = base.topk(top_k).indices.tolist()
        expected = expected_scores(base, beta * rewards[name], support)
        torch.testing.assert_close(row.double().log_softmax(-1), expected, rtol=0, atol=1e-5)
        assert float(row.logsumexp(-1)) == pytest.approx(float(base[support].logsumexp(-1)), abs=1e-5)


def test_rows_without_guidance_between_guided_ones_keep_their_bits(rng: random.Random) -> None:
    runtime, logits = scripted_runtime({"a": torch.randn(WIDTH)}), torch.randn(4, WIDTH)
    rows = begin_rows(runtime, [GUIDED] * 4)
    guided = logits.clone()
    runtime.step(guided, [rows[3], rows[1]])
    assert torch.equal(guided[[0, 2]], logits[[0, 2]])
    assert not torch.equal(guided[1], logits[1])
    assert not torch.equal(guided[3], logits[3])


@pytest.mark.parametrize("first", [1, 2])
def test_terms_of_an_earlier_step_are_not_used_for_rows_with_others(rng: random.Random, first: int) -> None:
    reward, logits = torch.randn(WIDTH), torch.randn(2, WIDTH)
    runtime = scripted_runtime({"a": reward})
    rows = begin_rows(runtime, [GUIDED, {**GUIDED, "beta": 2.5}])
    runtime.step(logits.clone(), rows[:first])
    guided = logits.clone()
    runtime.step(guided, rows[::-1])
    for row, base, beta in zip(guided, logits, (0.7, 2.5), strict=True):
        expected = expected_scores(base, beta * reward, list(range(WIDTH)))
        torch.testing.assert_close(row.double().log_softmax(-1), expected, rtol=0, atol=1e-5)


def test_the_candidates_that_a_model_reads_end_exactly_below_its_vocabulary(rng: random.Random) -> None:
    readable = rng.randrange(3, WIDTH - 3)
    runtime = scripted_runtime({"a": torch.randn(readable), "b": torch.randn(WIDTH)})
    logits = torch.randn(2, WIDTH)
    runtime.step(logits, begin_rows(runtime, [GUIDED, {**GUIDED, "reward_model": "b"}]))
    assert (logits[0] > -torch.inf).nonzero().flatten().tolist() == list(range(readable))
    assert bool(logits[1].isfinite().all()), "a neighbour's model reads more"


def test_the_narrowest_of_a_rows_models_decides_and_is_named(rng: random.Random) -> None:
    runtime = scripted_runtime({"a": torch.randn(9), "b": torch.randn(5)}, {"p": torch.randn(7)})
    guidance = {"method": "pargs", "rewards": [{"model": "a"}, {"model": "b"}], "policies": {"p": 1.0}, "top_k": 4}
    logits = torch.full((2, WIDTH), -5.0)
    logits[0, 3:7] = 5.0
    logits[1, 5:9] = 5.0
    rows = begin_rows(runtime, [guidance, guidance])
    guided = logits.clone()
    runtime.step(guided, rows)
    assert (guided[0] > -torch.inf).nonzero().flatten().tolist() == [3, 4]
    runtime.settle(wait=True)
    errors = [row.request.error for row in rows]
    assert errors[0] is None
    assert errors[1] == "none of the base's best 4 tokens is among the ids 0 to 4 that 'b' reads; raise top_k"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("budget", [None, 3.0])
def test_a_reward_that_is_not_a_finite_number_fails_its_row_and_names_its_model(
    rng: random.Random, value: float, budget: float | None
) -> None:
    spoilt = torch.randn(WIDTH)
    spoilt[rng.randrange(WIDTH)] = value
    runtime = scripted_runtime({"a": torch.randn(WIDTH), "bad": spoilt})
    both = {"method": "pargs", "rewards": [{"model": "a"}, {"model": "bad"}], "top_k": WIDTH}
    logits = torch.randn(3, WIDTH)
    guidances = [{**g, **({} if budget is None else {"kl_budget": budget})} for g in (GUIDED, both, GUIDED)]
    rows = begin_rows(runtime, guidances)
    guided = logits.clone()
    runtime.step(guided, rows)
    reason = "reward model 'bad' returned a reward that is not a finite number"
    assert [row.request.error for row in rows] == [None, reason, None]
    assert guided[1].exp().nonzero().flatten().tolist() == [END], "the failed row ends"
    assert bool(guided[[0, 2]].isfinite().all())


@pytest.mark.usefixtures("both_ways")
def test_a_whole_row_of_infinite_rewards_fails(rng: random.Random) -> None:
    for value in (math.inf, -math.inf):
        runtime = scripted_runtime({"a": torch.full((WIDTH,), value)})
        (row,) = begin_rows(runtime, [GUIDED])
        runtime.step(torch.randn(1, WIDTH), [row])
        assert row.request.error == "reward model 'a' returned a reward that is not a finite number"


def test_a_reward_of_a_candidate_that_is_masked_is_never_looked_at(rng: random.Random) -> None:
    rewards = torch.randn(WIDTH)
    rewards[3] = math.nan
    runtime = scripted_runtime({"a": rewards})
    (row,) = begin_rows(runtime, [GUIDED])
    logits = torch.randn(1, WIDTH)
    logits[0, 3] = -torch.inf
    runtime.step(logits, [row])
    assert row.request.error is None
    assert logits.isneginf().nonzero().tolist() == [[0, 3]]


def test_candidates_are_chosen_by_what_a_client_makes_of_the_logits_and_scored_by_the_models(
    rng: random.Random,
) -> None:
    reward, logits, bias = torch.randn(WIDTH), torch.randn(3, WIDTH), 4 * torch.randn(3, WIDTH)
    biased = (logits + bias).masked_fill(torch.rand(3, WIDTH) < 0.5, -torch.inf)
    biased[:, :2] = logits[:, :2]
    runtime = scripted_runtime({"a": reward})
    rows = begin_rows(runtime, [{**GUIDED, "top_k": 4}, {**GUIDED, "top_k": 2}, GUIDED])
    for chosen in ([0, 1, 2], [2, 0]):
        guided = logits.clone()
        runtime.step(guided, [rows[n] for n in chosen], biased=biased)
        for n in chosen:
            allowed = int((biased[n] > -torch.inf).sum())
            top_k = min(rows[n].request.plan.formula.top_k, allowed)
            support = biased[n].topk(top_k).indices.tolist()
            expected = expected_scores(logits[n], 0.7 * reward, support)
            torch.testing.assert_close(guided[n].double().log_softmax(-1), expected, rtol=0, atol=1e-5)
    step: Any = rows[0].request.positions[-1].step
    line = rows[0].request.positions[-1].line
    base = logits[0].double().masked_fill(biased[0].isneginf(), -torch.inf).log_softmax(-1)
    kept = step.base_logprobs[line] > -torch.inf
    own = base[step.ids[line][kept]]
    torch.testing.assert_close(step.base_logprobs[line][kept].double(), own, rtol=0, atol=1e-5)


def test_rewards_are_added_to_the_mixture_of_policies_that_a_row_names(rng: random.Random) -> None:
    reward, policies = torch.randn(WIDTH), {name: torch.randn(WIDTH) for name in "pq"}
    runtime, logits = scripted_runtime({"a": reward}, policies), torch.randn(4, WIDTH)
    mixtures: list[dict[str, float] | None] = [{"base": 0.4, "p": 0.6}, None, {"q": 1.0, "p": -0.3}, {"base": 0.5}]
    guidances = [{**GUIDED, **({} if mixture is None else {"policies": mixture})} for mixture in mixtures]
    for chosen in ([0, 1, 2, 3], [3]):
        guided = logits.clone()
        runtime.step(guided, [begin_rows(runtime, guidances)[n] for n in chosen])
        for n in chosen:
            mixture = {"base": 1.0} if mixtures[n] is None else mixtures[n]
            over = sum(c * (logits[n] if name == "base" else policies[name]) for name, c in mixture.items())
            expected = expected_scores(over, 0.7 * reward, list(range(WIDTH)))
            torch.testing.assert_close(guided[n].double().log_softmax(-1), expected, rtol=0, atol=1e-5)


def test_a_row_whose_candidates_no_policy_gives_any_probability_fails_and_names_them(rng: random.Random) -> None:
    policy = torch.randn(WIDTH)
    policy[4:] = -torch.inf
    runtime = scripted_runtime({"a": torch.randn(WIDTH)}, {"p": policy})
    logits = torch.randn(1, WIDTH)
    logits[0, 10:] += 20
    (row,) = begin_rows(runtime, [{**GUIDED, "top_k": 3, "policies": {"base": 0.5, "p": 0.5}}])
    runtime.step(logits, [row])
    reason = "each of the base's best 3 tokens has probability 0 under one of the policies 'p'"
    assert row.request.error == reason


def test_scores_beyond_float32_name_the_term_that_is_largest(rng: random.Random) -> None:
    runtime = scripted_runtime({"a": torch.rand(WIDTH), "big": 1e38 * (1 + torch.rand(WIDTH))})
    guidance = {"method": "pargs", "rewards": [{"model": "a"}, {"model": "big", "weight": 10.0}], "beta": 50.0}
    (row,) = begin_rows(runtime, [{**guidance, "top_k": 4}])
    runtime.step(torch.randn(1, WIDTH), [row])
    assert row.request.error is not None
    reason = "beta 50 times the weighted rewards is too large for float32: reward model 'big' returned "
    assert row.request.error.startswith(reason)


def test_the_time_of_each_stage_is_counted(rng: random.Random) -> None:
    runtime = scripted_runtime({"a": torch.randn(WIDTH)})
    runtime.step(torch.randn(1, WIDTH), begin_rows(runtime, [GUIDED]))
    work = runtime.work
    assert min(work.candidates_seconds, work.rewards_seconds, work.writing_seconds) > 0
    assert work.policies_seconds == 0
