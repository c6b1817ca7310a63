"""The same request with the same seed gives the same text alone and in a crowd, guided or not."""

import asyncio
import random

import pytest

from tests.server.polling import assert_no_block_stays_in_use
from tests.support.random_input import any_guidance, random_prompts
from tests.support.server import Server
from tests.support.traffic import Asked, ask


@pytest.mark.parametrize("guided_share", [0.5, 1.0])
def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(server: Server, guided_share: float) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    crowd = [_asked(rng, prompt, guided_share) for prompt in random_prompts(rng, 24, longest=150)]
    assert any(len(asked.prompt) > 64 for asked in crowd), "no prompt is read in pieces"

    async def run() -> None:
        async with server.async_client as client:
            together = await asyncio.gather(*(ask(client, asked) for asked in crowd))
            for asked, answers in zip(crowd, together, strict=True):
                alone = await ask(client, asked)
                assert [a.tokens for a in answers] == [a.tokens for a in alone], asked

    asyncio.run(run())
    assert_no_block_stays_in_use(server)


def _asked(rng: random.Random, prompt: list[int], guided_share: float) -> Asked:
    fields = {"temperature": rng.choice([0.7, 1.0, 1.3]), "seed": rng.randrange(2**31), "n": rng.choice([1, 1, 2])}
    guidance = any_guidance(rng) if rng.random() < guided_share else None
    return Asked(prompt, guidance, rng.randint(5, 30), fields)
