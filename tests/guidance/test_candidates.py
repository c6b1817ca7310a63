"""Scores of the base's best candidates, over scripted rewards: which tokens stay possible and how likely they are, and
which row fails when a reward cannot be used."""

import math
import random
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from steersman.guidance import candidates
from steersman.guidance.rows import Row
from tests.support.gpu_runtime import acting_as_gpu, count_launches
from tests.support.oracle import plan_of
from tests.support.scripted import END, ScriptedReward, ScriptedVocabularyReward, begin_rows, scripted_runtime

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


def test_the_terms_of_a_batch_are_built_once_for_as_long_as_it_stays(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, build = [], candidates.build_combination
    monkeypatch.setattr(candidates, "build_combination", lambda *given: built.append(given) or build(*given))
    runtime = scripted_runtime({"a": torch.randn(WIDTH)})
    rows = begin_rows(runtime, [GUIDED, {**GUIDED, "beta": 2.5}])
    for batch in (rows, rows, rows[:1], rows[:1]):
        runtime.step(torch.randn(2, WIDTH), batch)
    assert len(built) == 2


def test_a_device_with_kernels_writes_the_scores_in_one_launch_and_a_cpu_in_none(rng: random.Random) -> None:
    for context, launched in ((acting_as_gpu(), 1), (nullcontext(), 0)):
        with context:
            runtime = scripted_runtime({"a": torch.randn(WIDTH)})
            rows = begin_rows(runtime, [GUIDED])
            with count_launches() as launches:
                runtime.step(torch.randn(1, WIDTH), rows)
        assert launches["_rerank"] == launched


@pytest.mark.usefixtures("both_ways")
def test_a_budget_holds_for_its_own_row(rng: random.Random) -> None:
    reward, logits = 3 * torch.randn(WIDTH), torch.randn(2, WIDTH)
    runtime = scripted_runtime({"a": reward})
    guided = logits.clone()
    runtime.step(guided, begin_rows(runtime, [{**GUIDED, "beta": 4.0, "kl_budget": 0.8}, {**GUIDED, "beta": 4.0}]))
    p, q = guided[0].double().log_softmax(-1), logits[0].double().log_softmax(-1)
    assert float((p.exp() * (p - q)).sum()) == pytest.approx(0.8 / 8, rel=1e-3)
    expected = expected_scores(logits[1], 4.0 * reward, list(range(WIDTH)))
    torch.testing.assert_close(guided[1].double().log_softmax(-1), expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("both_ways")
def test_a_report_holds_what_was_written_and_what_it_was_made_of(rng: random.Random) -> None:
    reward, logits = torch.randn(WIDTH), torch.randn(2, WIDTH)
    runtime = scripted_runtime({"a": reward})
    guided = logits.clone()
    runtime.step(guided, begin_rows(runtime, [{**GUIDED, "top_k": 5}, {**GUIDED, "top_k": 5}]))
    for n in (0, 1):
        support = logits[n].topk(5).indices.tolist()
        token = rng.choice(support)
        report = runtime.finish(n, [token])
        assert report is not None
        kl = guided[n].log_softmax(-1)[token] - logits[n].log_softmax(-1)[token]
        assert (report.guided_tokens, report.kl) == (1, pytest.approx(float(kl), abs=1e-5))
        assert report.rewards == {"a": pytest.approx(float(reward[token]))}


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


def test_a_row_without_support_is_not_blamed_on_a_neighbours_narrow_model(rng: random.Random) -> None:
    policy = torch.full((WIDTH,), -torch.inf)
    runtime = scripted_runtime({"narrow": torch.randn(7), "wide": torch.randn(WIDTH)}, {"p": policy})
    guidances = [{**GUIDED, "reward_model": "narrow"}, {**GUIDED, "reward_model": "wide", "policies": {"p": 1.0}}]
    rows = begin_rows(runtime, guidances)
    runtime.step(torch.randn(2, WIDTH), rows)
    reason = f"each of the base's best {WIDTH} tokens has probability 0 under one of the policies 'p'"
    assert [row.request.error for row in rows] == [None, reason]


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
    assert int(kept.sum()) == min(4, int((biased[0] > -torch.inf).sum()))
    own = base[step.ids[line][kept]]
    torch.testing.assert_close(step.base_logprobs[line][kept].double(), own, rtol=0, atol=1e-5)


def test_rewards_are_added_to_the_mixture_of_policies_that_a_row_names(rng: random.Random) -> None:
    reward, policies = torch.randn(WIDTH), {name: torch.randn(WIDTH) for name in "pq"}
    runtime, logits = scripted_runtime({"a": reward}, policies), torch.randn(5, WIDTH)
    mixtures: list[dict[str, float] | None] = [
        {"base": 0.4, "p": 0.6},
        None,
        {"q": 1.0, "p": -0.3},
        {"base": 2.0},
        {"base": 1.0, "p": 0.7},
    ]
    guidances = [{**GUIDED, **({} if mixture is None else {"policies": mixture})} for mixture in mixtures]
    for chosen in ([0, 1, 2, 3, 4], [3], [4]):
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


class Steps:
    """Steps of one runtime, each compared with what its rows' own rewards and strengths make of the logits."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.rewards = {name: torch.randn(WIDTH) for name in "ab"}
        self.runtime = scripted_runtime(self.rewards)
        self.keys = iter(range(1000))

    def row(self, index: int, reward_model: str, beta: float, **fields: Any) -> Row:
        guidance = {"method": "pargs", "reward_model": reward_model, "beta": beta, "top_k": WIDTH, **fields}
        return Row(index, self.runtime.start(next(self.keys), plan_of(guidance), 1), [3], [])

    def check(self, rows: list[Row]) -> None:
        logits = torch.randn(5, WIDTH)
        guided = logits.clone()
        self.runtime.step(guided, rows)
        for row in rows:
            (term,) = row.request.plan.formula.rewards
            beta, top_k = row.request.plan.formula.beta, row.request.plan.formula.top_k
            base = logits[row.index]
            expected = expected_scores(base, beta * self.rewards[term.model], base.topk(top_k).indices.tolist())
            torch.testing.assert_close(guided[row.index].double().log_softmax(-1), expected, rtol=0, atol=1e-5)
        untouched = [n for n in range(5) if n not in {row.index for row in rows}]
        assert torch.equal(guided[untouched], logits[untouched])


@pytest.fixture
def steps(rng: random.Random) -> Steps:
    return Steps(rng)


@pytest.mark.usefixtures("both_ways")
def test_rows_that_come_go_and_move_keep_their_own_terms(steps: Steps) -> None:
    rows = [steps.row(0, "a", 0.5), steps.row(1, "b", 1.5), steps.row(2, "a", 2.5)]
    steps.check(rows)
    steps.check(rows)
    steps.check([*rows, steps.row(3, "b", 0.7)])
    steps.check(rows[1:])
    rows[2].index, rows[1].index = rows[1].index, rows[2].index
    steps.check(rows)
    steps.check(rows[::-1])
    rows[0].index = 4
    steps.check(rows)


@pytest.mark.usefixtures("both_ways")
def test_another_request_in_a_rows_place_brings_its_own_terms(steps: Steps) -> None:
    for beta in (0.5, 1.5, 2.5):
        for name in "ab":
            steps.check([steps.row(0, name, beta), steps.row(1, "a", 1.0)])


@pytest.mark.usefixtures("both_ways")
def test_a_request_that_has_ended_leaves_no_terms_to_one_whose_plan_lies_where_its_own_lay(steps: Steps) -> None:
    """Formulas are told apart by identity, which another one may have once the first is freed."""
    for n in range(8):
        row = steps.row(0, "ab"[n % 2], 0.2 + n / 5, top_k=2 + n)
        steps.check([row])
        steps.runtime.finish(row.request.key, [])
        del row


@pytest.mark.usefixtures("both_ways")
def test_a_model_that_is_loaded_again_under_its_name_is_the_one_that_is_asked(steps: Steps) -> None:
    row = steps.row(0, "a", 1.0)
    steps.check([row, steps.row(1, "b", 1.0)])
    for _ in range(3):
        # What the former's requests had planned holds for nobody any more.
        formula = row.request.plan
        steps.runtime.finish(row.request.key, [])
        steps.runtime.remove("a")
        steps.rewards["a"] = torch.randn(WIDTH)
        steps.runtime.add(ScriptedReward("a", steps.rewards["a"]))  # type: ignore[arg-type]
        row = Row(0, steps.runtime.start(next(steps.keys), formula, 1), [3], [])
        steps.check([row])


@pytest.mark.usefixtures("both_ways")
def test_a_model_of_another_kind_or_of_fewer_tokens_may_take_the_name(steps: Steps) -> None:
    row = steps.row(0, "a", 1.0)
    steps.check([row])
    plan = row.request.plan
    for build, size in ((ScriptedVocabularyReward, WIDTH), (ScriptedReward, 9), (ScriptedVocabularyReward, 11)):
        steps.runtime.finish(row.request.key, [])
        steps.runtime.remove("a")
        reward = torch.randn(size)
        steps.runtime.add(build("a", reward))  # type: ignore[arg-type]
        row = Row(0, steps.runtime.start(next(steps.keys), plan, 1), [3], [])
        logits = torch.randn(5, WIDTH)
        guided = logits.clone()
        steps.runtime.step(guided, [row])
        bonus = torch.zeros(WIDTH).index_copy(0, torch.arange(size), reward)
        expected = expected_scores(logits[0], bonus, list(range(size)))
        torch.testing.assert_close(guided[0].double().log_softmax(-1), expected, rtol=0, atol=1e-5)
