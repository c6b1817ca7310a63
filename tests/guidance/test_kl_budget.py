"""The KL budget: never exceeded on any path, and no position takes more than its share of what is left."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from steersman.guidance.generate import load_runtime
from steersman.guidance.kl_budget import SHARE, fit_budget
from steersman.guidance.rows import Row
from steersman.guidance.runtime import GuidanceRuntime
from tests.support.oracle import plan_of
from tests.support.random_input import random_prompts
from tests.support.tiny import VOCABULARY


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
