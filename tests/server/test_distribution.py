"""Sampled tokens follow the exact distribution of every method, and of no other."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from tests.support.oracle import Oracle, load_oracle
from tests.support.server import Server
from tests.support.tiny import END
from tests.support.traffic import Asked, ask, gather_limited, random_prompts

DRAWS = 20_000
_ACCEPT = 1e-3
_REJECT = 1e-6
"""With 20,000 draws a strength that is off by a quarter is found with a power close to one at this level."""


Joint = dict[tuple[int, ...], float]
"""Probability of every two-token answer."""

REWARDS: dict[str, dict[str, Any]] = {
    "one reward": {"method": "pargs", "reward_model": "first", "beta": 0.8, "top_k": 10},
    "two rewards": {
        "method": "pargs",
        "rewards": [
            {"model": "first", "weight": 0.5},
            {"model": "second", "transform": "log_sigmoid", "reference": 0.5},
        ],
        "beta": 0.7,
        "top_k": 6,
    },
    "a reward on the first token": {"method": "pargs", "reward_model": "first", "gate": {"first_tokens": 1}},
}
PRODUCT = {"base": 0.8, "expert": 0.6, "other": -0.4}


@pytest.fixture
def oracle(models: Path) -> Oracle:
    return load_oracle(models)


@pytest.fixture
def prompt() -> list[int]:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    return random_prompts(random.Random(seed), 1, shortest=6, longest=6)[0]


@pytest.mark.parametrize("guidance", REWARDS.values(), ids=list(REWARDS))
def test_rewards(server: Server, oracle: Oracle, prompt: list[int], guidance: dict[str, Any]) -> None:
    wrong = {**guidance, "beta": 0.75 * guidance.get("beta", 1.0)}
    _check(server, prompt, guidance, _joint(oracle, prompt, guidance), _joint(oracle, prompt, wrong))


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0, 1.7])
def test_mixed(server: Server, oracle: Oracle, prompt: list[int], mix: float) -> None:
    guidance = {"method": "mixed", "policy": "expert", "mix": mix}
    wrong = {**guidance, "mix": mix + 0.15}
    _check(server, prompt, guidance, _joint(oracle, prompt, guidance), _joint(oracle, prompt, wrong))


def test_length_control(server: Server, oracle: Oracle, prompt: list[int]) -> None:
    guidance = {"method": "length_control", "policy": "other", "length": 1}
    wrong = {**guidance, "length": 2}
    _check(server, prompt, guidance, _joint(oracle, prompt, guidance), _joint(oracle, prompt, wrong))


def test_a_product_of_three(server: Server, oracle: Oracle, prompt: list[int]) -> None:
    guidance = {"method": "product", "policies": PRODUCT}
    wrong = {"method": "product", "policies": {**PRODUCT, "other": -0.3}}
    _check(server, prompt, guidance, _joint(oracle, prompt, guidance), _joint(oracle, prompt, wrong))


def test_an_exact_kl_threshold_between_the_second_positions(server: Server, oracle: Oracle, prompt: list[int]) -> None:
    low, high = _thresholds(oracle, prompt)
    guidance = {"method": "kl_threshold", "policy": "expert", "threshold": low}
    wrong = {**guidance, "threshold": high}
    _check(server, prompt, guidance, _joint(oracle, prompt, guidance), _joint(oracle, prompt, wrong))


def test_a_monte_carlo_kl_threshold_opens_as_often_as_its_estimates_say(
    server: Server, oracle: Oracle, prompt: list[int]
) -> None:
    threshold, _ = _thresholds(oracle, prompt)
    guidance = {
        **{"method": "kl_threshold", "policy": "expert", "threshold": threshold},
        **{"estimator": "monte_carlo", "samples": 2},
    }
    right, wrong = (_joint_of_two_samples(oracle, prompt, t) for t in (threshold, threshold + 0.4))
    _check(server, prompt, guidance, right, wrong)


def _check(server: Server, prompt: list[int], guidance: dict[str, Any], right: Joint, wrong: Joint) -> None:
    counts = Counter(map(tuple, _draw(server, prompt, guidance)))
    assert sum(counts.values()) == DRAWS
    assert _p_value(counts, right) > _ACCEPT
    assert _p_value(counts, wrong) < _REJECT


def _draw(server: Server, prompt: list[int], guidance: dict) -> list[list[int]]:
    asked = Asked(prompt, guidance, 2, {"temperature": 1.0, "n": 100})

    async def run() -> list[list[int]]:
        client = server.async_client
        answers = await gather_limited(4, [ask(client, asked) for _ in range(DRAWS // 100)])
        return [choice.tokens for choices in answers for choice in choices]

    return asyncio.run(run())


def _joint(oracle: Oracle, prompt: list[int], guidance: dict[str, Any]) -> Joint:
    return _both_tokens(prompt, lambda tokens, position: oracle.step(tokens, guidance, position).logprobs)


def _joint_of_two_samples(oracle: Oracle, prompt: list[int], threshold: float) -> Joint:
    """The policy where the mean of two draws' log ratios exceeds the threshold, else the base."""

    def logprobs(tokens: list[int], _: int) -> torch.Tensor:
        base, policy = _base_and_expert(oracle, tokens)
        ratio, p = policy - base, policy.exp()
        opened = float((p.outer(p) * ((ratio.unsqueeze(0) + ratio.unsqueeze(1)) / 2 > threshold)).sum())
        return (opened * p + (1 - opened) * base.exp()).log()

    return _both_tokens(prompt, logprobs)


def _both_tokens(prompt: list[int], logprobs: Callable[[list[int], int], torch.Tensor]) -> Joint:
    """Answers that are less likely than one in a million draws of the test are left out."""
    joint: Joint = {}
    for v, p in enumerate(logprobs(prompt, 0).exp().tolist()):
        if v == END:
            joint[(v,)] = p
        elif p > 1e-9:
            second = logprobs([*prompt, v], 1).exp()
            joint.update({(v, w): p * q for w, q in enumerate(second.tolist()) if q > 1e-9})
    return joint


def _thresholds(oracle: Oracle, prompt: list[int]) -> tuple[float, float]:
    """Thresholds above which half and an eighth of the likely second positions lie."""
    _, policy = _base_and_expert(oracle, prompt)
    likely = policy.topk(60).indices.tolist()
    divergences = []
    for v in likely:
        base, expert = _base_and_expert(oracle, [*prompt, v])
        divergences.append(float((expert.exp() * (expert - base)).sum()))
    divergences.sort()
    return tuple((divergences[n] + divergences[n + 1]) / 2 for n in (29, 52))  # type: ignore[return-value]


def _base_and_expert(oracle: Oracle, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    sources = (oracle.models.base, oracle.models.policies["expert"])
    base, expert = (logits(tokens).double().log_softmax(-1) for logits in sources)
    return base, expert


def _p_value(counts: Counter, joint: dict[tuple[int, ...], float]) -> float:
    """Chi-squared test; cells that expect fewer than five draws are merged into one."""
    assert set(counts) <= set(joint), "a token outside of the support was drawn"
    large = [cell for cell, p in joint.items() if p * DRAWS >= 5]
    observed = [counts[cell] for cell in large]
    expected = [joint[cell] * DRAWS for cell in large]
    rest = DRAWS - sum(expected)
    if rest >= 5:
        observed.append(DRAWS - sum(observed))
        expected.append(rest)
    scale = sum(observed) / sum(expected)
    return float(stats.chisquare(observed, [e * scale for e in expected]).pvalue)
