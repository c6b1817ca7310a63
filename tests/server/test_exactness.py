"""Answers through the real server are the reference's, whatever else is in the batch."""

import asyncio
import random
from pathlib import Path

import httpx
import pytest

from tests.support.oracle import Oracle
from tests.support.random_input import any_guidance, random_prompts
from tests.support.server import Server
from tests.support.tiny import VOCABULARY
from tests.support.traffic import Answered, Asked, ask, disconnect, gather_limited

GREEDY = 200
CONCURRENCY = 32


@pytest.fixture(scope="module")
def crowd(interface: Server, models: Path) -> list[tuple[Asked, list[Answered]]]:
    """A crowd of greedy guided, sampled n=3, unguided and disconnecting requests at concurrency 32."""
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    before = _counters(interface)
    greedy = [Asked(p, any_guidance(rng), rng.randint(4, 24), {"temperature": 0}) for p in random_prompts(rng, GREEDY)]
    sampled = [
        Asked(p, any_guidance(rng), 12, {"temperature": 1, "n": 3, "seed": rng.randrange(1000)} if rng.random() < 0.5
              else {"temperature": 1, "n": 3})
        for p in random_prompts(rng, 20)
    ]  # fmt: skip
    plain = [Asked(p, None, 16, {"temperature": 0}) for p in random_prompts(rng, 40)]
    hasty = [Asked(p, any_guidance(rng), 60, {"temperature": 1}) for p in random_prompts(rng, 40)]
    kept = [*greedy, *sampled, *plain]

    async def run() -> list[list[Answered]]:
        client = interface.async_client
        work = [ask(client, asked) for asked in kept]
        work += [disconnect(client, asked, after=rng.randint(1, 8)) for asked in hasty]
        order = list(range(len(work)))
        rng.shuffle(order)
        results = await gather_limited(CONCURRENCY, [work[n] for n in order])
        placed = dict(zip(order, results, strict=True))
        return [placed[n] for n in range(len(kept))]

    answers = asyncio.run(run())
    after = _counters(interface)
    for name in ("vllm:num_preemptions_total", "vllm:prefix_cache_hits_total"):
        assert after[name] > before[name], f"the traffic was to force {name}"
    assert any(len(asked.prompt) > 64 for asked in kept), "no prompt was read in pieces"
    return list(zip(kept, answers, strict=True))


def test_greedy_answers_are_the_naive_reference_token_by_token(
    crowd: list[tuple[Asked, list[Answered]]], oracle: Oracle
) -> None:
    guided = [(a, r[0]) for a, r in crowd if a.guidance is not None and a.fields["temperature"] == 0]
    assert len(guided) == GREEDY
    ties = sum(oracle.assert_greedy(a.prompt, a.guidance, r.tokens, a.max_tokens) for a, r in guided)
    assert ties <= 0.02 * GREEDY


def test_reports_are_what_the_reference_computes_for_the_same_tokens(
    crowd: list[tuple[Asked, list[Answered]]], oracle: Oracle
) -> None:
    guided = [(a, r) for a, rs in crowd if a.guidance is not None for r in rs]
    compared = 0
    for asked, answered in random.sample(guided, 160):
        assert answered.guidance is not None
        compared += oracle.assert_report(asked.prompt, asked.guidance, answered.tokens, answered.guidance)
    assert compared >= 100, "near ties of gates are rare"


def test_choices_of_one_request_differ_and_each_carries_its_own_report(
    crowd: list[tuple[Asked, list[Answered]]],
) -> None:
    several = [answers for _, answers in crowd if len(answers) == 3]
    assert len(several) == 20
    # About one in five has a single candidate or one that leads by far: three answers alike prove nothing.
    differing = sum(len({tuple(a.tokens) for a in answers}) > 1 for answers in several)
    assert differing >= 8
    assert all(a.guidance is not None and a.guidance["tokens"] == len(a.tokens) for r in several for a in r)


def test_unguided_neighbours_get_the_base_models_own_answer(
    crowd: list[tuple[Asked, list[Answered]]], oracle: Oracle
) -> None:
    for asked, answers in crowd:
        if asked.guidance is None:
            tokens = list(asked.prompt)
            for token in answers[0].tokens:
                logits = oracle.logits(tokens)
                assert logits[token] >= logits.max() - 1e-4
                tokens.append(token)
            assert answers[0].guidance is None


def test_reward_model_tokens_are_the_prompt_once_and_one_plus_k_a_step(interface: Server) -> None:
    rng = random.Random()
    for n, k in enumerate((1, 10, 33)):
        # No other test's prompts begin so: nothing of this one is in the cache.
        prompt = [VOCABULARY - 8 + n, *random_prompts(rng, 1, shortest=30, longest=40)[0]]
        guidance = {"method": "pargs", "reward_model": "first", "top_k": k}
        body = interface.complete(prompt, guidance, max_tokens=20, temperature=0, ignore_eos=True)
        assert body["choices"][0]["guidance"]["reward_model_tokens"] == len(prompt) - 1 + 20 * (1 + k)
        again = interface.complete(prompt, guidance, max_tokens=1, temperature=0, ignore_eos=True)
        assert again["choices"][0]["guidance"]["reward_model_tokens"] == 1 + k, "the prompt was read twice"


def _counters(server: Server) -> dict[str, float]:
    lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    samples = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
    return {name.split("{")[0]: float(value) for name, value in samples}
