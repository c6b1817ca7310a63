"""The help desk's texts."""

import random
import re
import subprocess
import sys

import pytest

from steersman.training.world import gold
from steersman.training.world.grammar import (
    SPLITS,
    all_sentences,
    draw_copying,
    draw_prompts,
    draw_response,
    in_split,
    pattern,
)


def responses(count: int, seed: int = 0) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    return [(prompt.text, draw_response(prompt, rng)) for prompt in draw_prompts("base", count, seed)]


def test_the_same_seed_gives_the_same_texts() -> None:
    assert responses(50) == responses(50) != responses(50, seed=1)


def test_no_prompt_is_in_two_splits() -> None:
    assert sorted(bucket for buckets in SPLITS.values() for bucket in buckets) == list(range(100))
    for split in SPLITS:
        prompts = draw_prompts(split, 200)
        assert len({prompt.text for prompt in prompts}) == 200
        assert all(in_split(prompt, split) for prompt in prompts)


def test_prompts_are_what_gold_reads_them_as() -> None:
    for prompt in draw_prompts("tuning", 200):
        assert prompt.text == f"Customer: {prompt.message}\nAgent:"
        assert (gold.read_item(prompt.text), gold.read_issue(prompt.text)) == (prompt.item, prompt.issue)
        assert prompt.message.endswith(prompt.name)


def test_responses_are_made_of_the_sentences_that_gold_finds_grammatical() -> None:
    sentences = re.compile("|".join(map(pattern, all_sentences())))
    for prompt, response in responses(300):
        assert response.startswith(" Hello")
        found = [response[scored.start : scored.end] for scored in gold.score_sentences(prompt, response)]
        assert "".join(found) == response
        assert all(sentences.fullmatch(sentence.strip()) for sentence in found)


def test_agents_differ_and_what_they_write_differs_in_gold() -> None:
    totals = [gold.score(prompt, response).total for prompt, response in responses(2000)]
    mean = sum(totals) / len(totals)
    deviation = (sum((total - mean) ** 2 for total in totals) / len(totals)) ** 0.5
    assert -0.5 < mean < 1.0
    assert 1.4 < deviation < 2.0
    assert max(totals) == gold.MAXIMUM


def test_copying_texts_repeat_item_name_and_remedy_of_their_prompt() -> None:
    rng = random.Random(0)
    for prompt in draw_prompts("base", 50):
        response = draw_copying(prompt, rng)
        assert prompt.item in response
        assert prompt.name in response
        assert gold.score(prompt.text, response).helpful == 1.5


@pytest.mark.parametrize("module", ["grammar", "gold"])
def test_the_world_s_texts_need_no_torch(module: str) -> None:
    code = f"import sys, steersman.training.world.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
