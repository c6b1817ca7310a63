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
_ACCEPT = 1e-4
_REJECT = 1e-6
"""With 20,000 draws a coefficient that is off by a quarter is found with a power close to one at this level."""
_BINS = 30


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
    assert set(counts) <= set(right), "a token outside of the support was drawn"
    assert _p_value(counts, right, [[cell] for cell in right]) > _ACCEPT
    bins = _bins_that_tell_apart(right, wrong)
    assert _p_value(counts, right, bins) > _ACCEPT
    assert _p_value(counts, wrong, bins) < _REJECT


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


def _bins_that_tell_apart(right: Joint, wrong: Joint) -> list[list[tuple[int, ...]]]:
    """Answers in bins of like probability, ordered by how much more likely one distribution makes them: the test
    that looks at these has nearly the power of the likelihood ratio."""
    cells = sorted(right.keys() | wrong.keys(), key=lambda c: (right.get(c, 0.0) + 1e-12) / (wrong.get(c, 0.0) + 1e-12))
    bins: list[list[tuple[int, ...]]] = [[]]
    mass = 0.0
    for cell in cells:
        bins[-1].append(cell)
        mass += right.get(cell, 0.0)
        if mass > 1 / _BINS:
            bins.append([])
            mass = 0.0
    return bins


def _p_value(counts: Counter, joint: Joint, bins: list[list[tuple[int, ...]]]) -> float:
    """Chi-squared test over bins; those that expect fewer than five draws are merged into one."""
    expected = [DRAWS * sum(joint.get(cell, 0.0) for cell in cells) for cells in bins]
    observed = [sum(counts[cell] for cell in cells) for cells in bins]
    large = [(o, e) for o, e in zip(observed, expected, strict=True) if e >= 5]
    rest = DRAWS - sum(e for _, e in large)
    if rest >= 5:
        large.append((DRAWS - sum(o for o, _ in large), rest))
    scale = sum(o for o, _ in large) / sum(e for _, e in large)
    return float(stats.chisquare([o for o, _ in large], [e * scale for _, e in large]).pvalue)
