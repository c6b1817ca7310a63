"""Policies blended with the base, and rewards of every token, over scripted models: every row by its own formula, and
by the base where nothing else is possible."""

import math
import random
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from steersman.guidance.report import ChosenStep
from tests.support.gpu_runtime import acting_as_gpu, count_launches
from tests.support.scripted import END, begin_rows, scripted_runtime

WIDTH = 24
HALF = WIDTH // 2


@pytest.fixture(params=["plain", "kernels"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a CPU, and as a GPU does it."""
    with acting_as_gpu() if request.param == "kernels" else nullcontext():
        yield


def mixed(mix: float, policy: str = "p", **more: Any) -> dict[str, Any]:
    return {"method": "mixed", "policy": policy, "mix": mix, **more}


def product(**policies: float) -> dict[str, Any]:
    return {"method": "product", "policies": policies}


@pytest.mark.usefixtures("both_ways")
def test_every_row_is_blended_by_its_own_coefficients(rng: random.Random) -> None:
    models = {name: torch.randn(WIDTH) for name in "pqr"}
    wanted = [
        {"base": 0.3, "p": 0.7},
        {"base": -0.5, "q": 1.5},
        {"p": 1.0},
        {"p": 0.4, "q": 0.9},
        {"base": 1, "r": 0.2},
    ]
    runtime, logits = scripted_runtime(policies=models), torch.randn(6, WIDTH)
    rows = begin_rows(runtime, [product(**coefficients) for coefficients in wanted])
    guided = logits.clone()
    runtime.step(guided, [rows[n] for n in (4, 0, 3, 1, 2)])
    for n, coefficients in enumerate(wanted):
        expected = sum(c * (logits[n] if name == "base" else models[name]) for name, c in coefficients.items())
        torch.testing.assert_close(guided[n].log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=1e-5)
    assert torch.equal(guided[5], logits[5])


def test_the_base_decodes_where_it_has_no_token_in_common_with_the_policy(rng: random.Random) -> None:
    policy = torch.randn(WIDTH)
    policy[:HALF] = -torch.inf
    logits = torch.randn(3, WIDTH)
    logits[0, HALF:] = -torch.inf
    for guidance in (mixed(0.5), {**product(base=0.5, p=0.2, q=0.1)}):
        runtime = scripted_runtime(policies={"p": policy, "q": torch.randn(WIDTH)})
        rows = begin_rows(runtime, [guidance] * 2)
        guided = logits.clone()
        runtime.step(guided, rows)
        assert torch.equal(guided[0], logits[0])
        assert bool(guided[1, :HALF].isneginf().all()), "the neighbour has tokens in common"
        assert [runtime.finish(n, [token]).sources for n, token in enumerate((2, HALF))] == [
            {"base": 1},
            {"mixture": 1},
        ]


@pytest.mark.usefixtures("both_ways")
def test_the_base_decodes_where_a_mask_leaves_it_no_token_in_common_with_the_policy(rng: random.Random) -> None:
    policy = torch.randn(WIDTH)
    policy[:HALF] = -torch.inf
    logits, biased = torch.randn(2, WIDTH), torch.randn(2, WIDTH)
    biased[0, HALF:] = -torch.inf
    biased[1, :END] = -torch.inf
    for guidance in (mixed(0.5), product(base=0.5, p=0.2, q=0.1)):
        for order in ([0, 1], [1, 0]):
            runtime = scripted_runtime(policies={"p": policy, "q": torch.zeros(WIDTH)})
            rows = begin_rows(runtime, [guidance] * 2)
            guided = logits.clone()
            runtime.step(guided, [rows[n] for n in order], biased=biased)
            assert torch.equal(guided[0], logits[0])
            weight = 0.5 if guidance["method"] == "mixed" else 0.2
            expected = (0.5 * logits[1] + weight * policy).masked_fill(biased[1].isneginf(), -torch.inf)
            torch.testing.assert_close(guided[1].log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("both_ways")
def test_what_is_recorded_knows_no_masks(rng: random.Random) -> None:
    policy, logits = torch.randn(WIDTH), torch.randn(1, WIDTH)
    for guidance in (mixed(1.0), mixed(1.0, kl_budget=1000.0)):
        runtime = scripted_runtime(policies={"p": policy})
        (row,) = begin_rows(runtime, [guidance])
        biased = logits.clone()
        biased[0, 5:] = -torch.inf
        runtime.step(logits.clone(), [row], biased=biased)
        report = runtime.finish(0, [3])
        assert report is not None
        expected = policy.log_softmax(-1)[3] - logits[0].log_softmax(-1)[3]
        assert report.kl == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.usefixtures("both_ways")
def test_a_gate_that_is_closed_leaves_the_formula_below_it(rng: random.Random) -> None:
    policy, logits = 3 * torch.randn(WIDTH), torch.randn(2, WIDTH)
    kl = [float((policy.softmax(-1) * (policy.log_softmax(-1) - b.log_softmax(-1))).sum()) for b in logits]
    for factor, source, weight in ((0.9, "p", 1.0), (1.1, "mixture", 0.25)):
        runtime = scripted_runtime(policies={"p": policy})
        asked = [{"method": "kl_threshold", "policy": "p", "mix": 0.25, "threshold": factor * value} for value in kl]
        guided = logits.clone()
        runtime.step(guided, begin_rows(runtime, asked))
        expected = (1 - weight) * logits + weight * policy
        torch.testing.assert_close(guided.log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=1e-5)
        assert [runtime.finish(n, [4]).sources for n in (0, 1)] == [{source: 1}] * 2


@pytest.mark.usefixtures("both_ways")
def test_a_gate_that_is_closed_leaves_the_base_where_nothing_else_is_below_it(rng: random.Random) -> None:
    policy, logits = 3 * torch.randn(WIDTH), torch.randn(2, WIDTH)
    runtime = scripted_runtime(policies={"p": policy})
    asked = [{"method": "kl_threshold", "policy": "p", "threshold": threshold} for threshold in (1e6, 0.0)]
    guided = logits.clone()
    runtime.step(guided, begin_rows(runtime, asked))
    assert torch.equal(guided[0], logits[0])
    torch.testing.assert_close(guided[1].log_softmax(-1), policy.log_softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("both_ways")
def test_each_request_draws_its_own_samples_for_an_estimated_gate(rng: random.Random) -> None:
    count = 16
    # Two tokens are equally likely samples; the log-ratio of one is above the threshold, that of the other below.
    policy, base = torch.full((WIDTH,), -30.0), torch.full((WIDTH,), -5.0)
    policy[:2] = 0.0
    base[:2] = torch.tensor([0.1, 0.9]).log()
    asked = {"method": "kl_threshold", "policy": "p", "threshold": 0.5, "estimator": "monte_carlo", "samples": 1}
    runtime = scripted_runtime(policies={"p": policy})
    rows = begin_rows(runtime, [asked] * count)
    for row in rows:
        row.request.seed = rng.randrange(2**31)
    logits = base.expand(count, -1).clone()
    runtime.step(logits, rows)
    opened = [not torch.equal(line, base) for line in logits]
    assert 0 < sum(opened) < count


def test_a_device_with_kernels_blends_rows_of_one_policy_in_one_launch_and_a_cpu_in_none(rng: random.Random) -> None:
    exact = {"method": "kl_threshold", "policy": "p", "threshold": 0.1}
    for context, launched in ((acting_as_gpu(), 1), (nullcontext(), 0)):
        with context:
            runtime = scripted_runtime(policies={"p": torch.randn(WIDTH)})
            rows = begin_rows(runtime, [mixed(0.5), exact, mixed(0.3)])
            with count_launches() as launches:
                runtime.step(torch.randn(3, WIDTH), rows)
        assert launches["_blend"] == launched


@pytest.mark.usefixtures("both_ways")
def test_a_budget_holds_over_the_whole_vocabulary(rng: random.Random) -> None:
    policy, logits = 5 * torch.randn(WIDTH), torch.randn(2, WIDTH)
    runtime = scripted_runtime(policies={"p": policy})
    guided = logits.clone()
    runtime.step(guided, begin_rows(runtime, [mixed(1.0, kl_budget=0.8), mixed(1.0)]))
    p, q = guided[0].double().log_softmax(-1), logits[0].double().log_softmax(-1)
    assert float((p.exp() * (p - q)).sum()) == pytest.approx(0.8 / 8, rel=1e-3)
    torch.testing.assert_close(guided[1].log_softmax(-1), policy.log_softmax(-1), rtol=0, atol=1e-5)


def test_a_policy_that_a_rows_gate_alone_reads_is_no_part_of_its_mixture(rng: random.Random) -> None:
    policies, logits = {name: 3 * torch.randn(WIDTH) for name in "pq"}, torch.randn(2, WIDTH)
    runtime = scripted_runtime(policies=policies)
    gated = mixed(0.5, gate={"kl_above": 0.0, "policy": "q"})
    guided = logits.clone()
    runtime.step(guided, begin_rows(runtime, [gated, mixed(0.5, policy="q")]))
    for line, base, name in zip(guided, logits, "pq", strict=True):
        expected = 0.5 * base + 0.5 * policies[name]
        torch.testing.assert_close(line.log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("both_ways")
def test_rewards_of_every_token_are_added_over_the_whole_vocabulary(rng: random.Random) -> None:
    heads = {name: torch.randn(WIDTH) for name in "ab"}
    policy, logits = torch.randn(WIDTH), torch.randn(4, WIDTH)
    runtime = scripted_runtime(policies={"p": policy}, heads=heads)
    every = {"method": "pargs", "top_k": None}
    asked: list[dict[str, Any]] = [
        {**every, "reward_model": "a", "beta": 0.7},
        mixed(0.5),
        {**every, "rewards": [{"model": "a", "weight": 2.0}, {"model": "b", "weight": -1.0}], "beta": 0.4},
        {**every, "reward_model": "b", "beta": 1.5, "policies": {"p": 1.0}},
    ]
    guided = logits.clone()
    runtime.step(guided, begin_rows(runtime, asked))
    expected = torch.stack(
        (
            logits[0] + 0.7 * heads["a"],
            0.5 * logits[1] + 0.5 * policy,
            logits[2] + 0.8 * heads["a"] - 0.4 * heads["b"],
            policy + 1.5 * heads["b"],
        )
    )
    torch.testing.assert_close(guided.log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=1e-5)
    reports = [runtime.finish(n, [3]) for n in range(4)]
    assert reports[2].rewards == pytest.approx({name: float(values[3]) for name, values in heads.items()})
    assert [report.sources for report in reports] == [{"guided": 1}, {"mixture": 1}, {"guided": 1}, {"guided": 1}]


def test_a_token_without_a_reward_is_no_part_of_the_support(rng: random.Random) -> None:
    reward, logits = torch.randn(HALF), torch.randn(1, WIDTH)
    runtime = scripted_runtime(heads={"a": reward})
    guided = logits.clone()
    runtime.step(guided, begin_rows(runtime, [{"method": "pargs", "reward_model": "a", "top_k": None, "beta": 1.0}]))
    assert bool(guided[0, HALF:].isneginf().all())
    expected = (logits[0, :HALF] + reward).log_softmax(-1)
    torch.testing.assert_close(guided[0, :HALF].log_softmax(-1), expected, rtol=0, atol=1e-5)


def test_rewards_of_every_token_that_are_too_large_fail_their_row_alone(rng: random.Random) -> None:
    heads = {"a": torch.randn(WIDTH), "big": 3e38 * torch.rand(WIDTH)}
    runtime, logits = scripted_runtime(heads=heads), torch.randn(2, WIDTH)
    asked = [{"method": "pargs", "reward_model": name, "top_k": None, "beta": 40.0} for name in heads]
    rows = begin_rows(runtime, asked)
    runtime.step(logits, rows)
    assert rows[0].request.error is None
    assert rows[1].request.error is not None
    assert "too large for float32: reward model 'big' returned" in rows[1].request.error


def test_where_no_allowed_token_has_a_reward_the_base_decodes_and_the_row_goes_on(rng: random.Random) -> None:
    runtime, logits = scripted_runtime(heads={"a": torch.randn(HALF)}), torch.randn(2, WIDTH)
    logits[0, :HALF] = -torch.inf
    asked = {"method": "pargs", "reward_model": "a", "top_k": None, "beta": 1.0}
    rows = begin_rows(runtime, [asked] * 2)
    guided = logits.clone()
    runtime.step(guided, rows)
    assert torch.equal(guided[0], logits[0])
    assert [row.request.error for row in rows] == [None, None]


def test_logits_that_are_not_numbers_fail_the_row_that_reads_them(rng: random.Random) -> None:
    def logits_of(tokens: list[int]) -> torch.Tensor:
        outputs = torch.zeros(WIDTH)
        outputs[7] = math.nan if tokens[0] == 1 else 1.0
        return outputs

    runtime = scripted_runtime(policies={"p": logits_of})
    rows = begin_rows(runtime, [mixed(0.5)] * 3)
    runtime.step(torch.randn(3, WIDTH), rows)
    reason = "policy 'p' returned logits that are not finite numbers"
    assert [row.request.error for row in rows] == [None, reason, None]
    assert [isinstance(row.request.positions[-1].step, ChosenStep) for row in rows] == [False] * 3
