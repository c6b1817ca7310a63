"""Load by vLLM's own generator, sent to the real server."""

import asyncio
import random

from steersman.benchmarks.load_traffic import PLAIN, Arm, Traffic, send
from tests.server.test_metrics import MIXED, PARGS
from tests.support.random_input import random_prompts
from tests.support.server import Server


def test_kinds_of_one_arm_are_sent_in_turn_and_seen_apart(server: Server, rng: random.Random) -> None:
    prompts = [str(prompt) for prompt in random_prompts(rng, 20, 5, 20)]
    traffic = Traffic(server.url, "base", prompts, max_tokens=8, seconds=1.0, concurrency=8)
    arm = Arm("mixed", ((PLAIN, None), ("pargs", PARGS), ("broken", {**PARGS, "beta": -1}), ("mixed", MIXED)))
    measured = asyncio.run(send(traffic, arm, 24.0))
    assert [sent.kind for sent in measured.sent] == [kind for kind, _ in arm.kinds] * 6
    assert measured.kl.keys() == {"pargs", "mixed"}
    for sent in measured.sent:
        assert sent.prompt in prompts
        assert bool(sent.error) == (sent.kind == "broken")
        if not sent.error:
            assert 1 <= sent.tokens <= 8
            assert 0 < sent.first_token <= sent.whole
            assert sum(sent.gaps) <= sent.whole
