"""The KL budget: never exceeded on any path, and no position takes more than its share of what is left."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from steersman.guidance.generate import load_runtime
from steersman.guidance.kl_budget import fit_budget, fit_budgets
from steersman.guidance.rows import GuidedRequest, Row, Steered
from steersman.guidance.runtime import GuidanceRuntime
from tests.support.oracle import plan_of
from tests.support.random_input import random_prompts
from tests.support.tiny import VOCABULARY

SHARE = 1 / 8
"""Of what is left that one position may take."""


@pytest.fixture(scope="module")
def runtime(models: Path) -> GuidanceRuntime:
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    rewards = {"first": str(models / "first")}
    return load_runtime(tokenizer, rewards, {"expert": str(models / "expert")}, cache_bytes=2**22)


def test_a_position_that_takes_less_than_its_share_keeps_its_distribution(rng: random.Random) -> None:
    base = torch.randn(6, 40).log_softmax(-1)
    scores = base + torch.randn(6, 40)
    fitted = fit_budget(scores, base, torch.full((6,), 60.0))
    torch.testing.assert_close(fitted.scores.softmax(-1), scores.softmax(-1))


def test_a_position_that_would_take_more_is_weakened_to_its_share(rng: random.Random) -> None:
    base = torch.randn(8, 40).log_softmax(-1)
    scores = base + 3 * torch.randn(8, 40)
    left = torch.rand(8) * 4 + 0.1
    fitted = fit_budget(scores, base, left)
    p = fitted.scores.double().softmax(-1)
    kl = (p * (p.log() - base.double())).sum(-1)
    assert bool((kl <= SHARE * left + 1e-5).all())
    torch.testing.assert_close(kl, SHARE * left.double(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(kl, fitted.kl.double(), rtol=1e-3, atol=1e-5)
    # On the geometric path: log π_s − log π₀ is s times the whole change, up to a constant.
    change, whole = fitted.scores - base, scores - base
    change, whole = change - change.mean(-1, keepdim=True), whole - whole.mean(-1, keepdim=True)
    strength = (change * whole).sum(-1, keepdim=True) / (whole * whole).sum(-1, keepdim=True)
    torch.testing.assert_close(change, strength * whole, rtol=0, atol=1e-4)
    assert bool(((strength > 0) & (strength < 1)).all())


def test_only_tokens_that_base_and_guidance_both_allow_are_counted_and_stay_possible(rng: random.Random) -> None:
    base, change = torch.randn(8, 40), 3 * torch.randn(8, 40)
    scores, masked = base + change, torch.rand(2, 8, 40) < 0.3
    base, scores = base.masked_fill(masked[0], -torch.inf), scores.masked_fill(masked[1], -torch.inf)
    left = torch.tensor([0.2, 1000.0]).repeat(4)
    fitted = fit_budget(scores, base, left)
    absent = masked.any(dim=0)
    assert torch.equal(fitted.scores.isneginf(), absent)
    p = fitted.scores.double().softmax(-1)
    q = base.double().masked_fill(absent, -torch.inf).softmax(-1)
    kl = torch.where(absent, 0.0, p * (p / q).log()).sum(-1)
    torch.testing.assert_close(kl, fitted.kl.double(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(kl[::2], SHARE * left[::2].double(), rtol=1e-3, atol=1e-5)
    free = scores[1::2].masked_fill(absent[1::2], -torch.inf)
    torch.testing.assert_close(fitted.scores[1::2].softmax(-1), free.softmax(-1))


def test_a_batch_without_a_budget_is_left_as_it_is() -> None:
    plan, scores = plan_of({"method": "mixed", "policy": "p", "mix": 1.0}), torch.randn(1, 40)
    steered = [Steered(Row(0, GuidedRequest(0, plan, 1), [3], []), plan.formula)]
    assert fit_budgets(steered, scores, torch.randn(1, 40)) is scores


def test_each_row_with_a_budget_spends_its_own_and_a_row_of_nan_spends_nothing(rng: random.Random) -> None:
    guidance = {"method": "mixed", "policy": "p", "mix": 1.0}
    steered, base = [], torch.randn(5, 40)
    scores = base + 3 * torch.randn(5, 40)
    for n, budget in enumerate([4.0, None, 8.0, 1000.0, 4.0]):
        request = GuidedRequest(n, plan_of({**guidance, "kl_budget": budget}), 1)
        request.spent = [] if budget is None else [1.0, 0.0]
        steered.append(Steered(Row(n, request, [3], [4]), request.plan.formula))
    scores[4] = torch.nan
    fitted = fit_budgets(steered, scores, base)
    assert torch.equal(fitted[1], scores[1])
    assert bool(fitted[4].isnan().all())
    p, q = fitted.double().log_softmax(-1), base.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).tolist()
    assert kl[:3:2] == pytest.approx([SHARE * 3.0, SHARE * 7.0], rel=1e-3)
    for n in (0, 2, 3):
        assert steered[n].row.request.spent == [1.0, pytest.approx(kl[n], rel=1e-3)]
    assert [steered[n].row.request.spent for n in (1, 4)] == [[], [1.0, 0.0]]


def test_what_the_top_k_leave_out_is_not_counted(rng: random.Random) -> None:
    base = torch.randn(3, 300).log_softmax(-1)
    top = base.topk(2).values
    fitted = fit_budget(top, top, torch.full((3,), 0.05))
    torch.testing.assert_close(fitted.scores.softmax(-1), top.softmax(-1))
    assert fitted.kl.tolist() == pytest.approx([0.0] * 3, abs=1e-6)


@pytest.mark.parametrize("budget", [0.3, 2.0, 6.0])
@pytest.mark.parametrize(
    "guidance",
    [
        {"method": "pargs", "reward_model": "first", "beta": 2.0, "top_k": 10},
        {"method": "mixed", "policy": "expert", "mix": 1.2},
        {"method": "product", "policies": {"base": 1.0, "expert": 1.0}},
    ],
    ids=lambda g: g["method"],
)
def test_the_sum_of_the_positions_kl_never_exceeds_it(
    runtime: GuidanceRuntime, rng: random.Random, guidance: dict, budget: float
) -> None:
    prompt = random_prompts(rng, 1)[0]
    request = runtime.start("budget", plan_of({**guidance, "kl_budget": budget}), len(prompt))
    row = Row(0, request, prompt, [])
    spent, output, free = 0.0, [], []
    for _ in range(30):
        row.output = list(output)
        logits = 5 * torch.randn(1, VOCABULARY)
        guided = logits.clone()
        runtime.step(guided, [row])
        free.append(torch.equal(guided, logits))
        p = guided.double().softmax(-1)
        q = torch.where(p > 0, logits.double(), -torch.inf).softmax(-1)
        spent += float((p * (p / q).log()).nan_to_num(0.0).sum())
        assert spent <= budget + 1e-4
        output.append(int(torch.multinomial(guided.softmax(-1), 1)))
    report = runtime.finish("budget", output)
    assert report is not None
    assert report.kl_spent == pytest.approx(spent, abs=1e-4)
    assert report.kl_spent > 0.2 * budget, "thirty positions take a good part of it"
    assert report.guided_tokens == len(free) - sum(free)
