"""Sampled tokens follow the exact PARGS distribution."""

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest
from scipy import stats

from tests.support.oracle import load_oracle
from tests.support.server import Server
from tests.support.tiny import END
from tests.support.traffic import Asked, ask, gather_limited, random_prompts

DRAWS = 20_000
_ACCEPT = 1e-3
_REJECT = 1e-6
"""With 20,000 draws a strength that is off by a quarter is found with a power close to one at this level."""


@pytest.mark.parametrize(
    "guidance",
    [
        {"method": "pargs", "reward_model": "first", "beta": 0.8, "top_k": 10},
        {
            "method": "pargs",
            "rewards": [
                {"model": "first", "weight": 0.5},
                {"model": "second", "transform": "log_sigmoid", "reference": 0.5},
            ],
            "beta": 0.7,
            "top_k": 6,
        },
    ],
    ids=["one reward", "two rewards"],
)
def test_two_sampled_tokens_are_chi_squared_distributed_as_the_formula_says(
    server: Server, models: Path, guidance: dict
) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    prompt = random_prompts(random.Random(seed), 1, shortest=6, longest=6)[0]
    counts = Counter(map(tuple, _draw(server, prompt, guidance)))
    assert sum(counts.values()) == DRAWS
    assert _p_value(counts, _joint(models, prompt, guidance)) > _ACCEPT
    wrong = {**guidance, "beta": 0.75 * guidance["beta"]}
    assert _p_value(counts, _joint(models, prompt, wrong)) < _REJECT


def _draw(server: Server, prompt: list[int], guidance: dict) -> list[list[int]]:
    asked = Asked(prompt, guidance, 2, {"temperature": 1.0, "n": 100})

    async def run() -> list[list[int]]:
        client = server.async_client
        answers = await gather_limited(4, [ask(client, asked) for _ in range(DRAWS // 100)])
        return [choice.tokens for choices in answers for choice in choices]

    return asyncio.run(run())


def _joint(models: Path, prompt: list[int], guidance: dict) -> dict[tuple[int, ...], float]:
    """Exact probability of every two-token answer."""
    oracle = load_oracle(models)
    joint: dict[tuple[int, ...], float] = {}
    first = oracle.step(prompt, guidance)
    for v in first.candidates:
        p = float(first.logprobs[v].exp())
        if v == END:
            joint[(v,)] = p
            continue
        second = oracle.step([*prompt, v], guidance)
        joint.update({(v, w): p * float(second.logprobs[w].exp()) for w in second.candidates})
    return joint


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
