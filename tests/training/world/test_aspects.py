"""Scores of sentences by aspect: what an annotator of the world would give."""

import random

import pytest

from steersman.training.world.aspects import ERROR, HIGHEST, NEUTRAL, WEIGHTS, annotate, segment
from steersman.training.world.gold import Gold, score
from steersman.training.world.grammar import draw_prompts, draw_response

PROMPT = "Customer: Hello, the refund for my kettle is missing. Can you help me? David\nAgent:"


def draw_texts(rng: random.Random, count: int) -> list[tuple[str, str]]:
    prompts = draw_prompts("base", count, rng.randrange(2**31))
    return [(prompt.text, draw_response(prompt, rng)) for prompt in prompts]


def test_the_texts_of_segments_join_to_the_response(rng: random.Random) -> None:
    texts = draw_texts(rng, 40)
    cut = [
        (prompt, response[: rng.randint(1, len(response))].rstrip() + rng.choice(("", " ", ".\n")))
        for prompt, response in texts
    ]
    for prompt, response in texts + cut:
        segments = segment(prompt, response, rng)
        assert "".join(part["text"] for part in segments) == response
        assert all(part["text"].strip() for part in segments)
        for part in segments:
            assert set(part["scores"]) == set(WEIGHTS)
            assert all(0 <= value <= HIGHEST for value in part["scores"].values())


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        (" Hello David.", {}),
        (" As a next step, I have arranged the refund for the kettle.", {"helpful": 4, "attentive": 4}),
        (" For now, I have arranged the voucher for you.", {"helpful": 0}),
        (" I have read your message about the lamp.", {"attentive": 0}),
        (" I am sorry about the trouble with your kettle.", {"attentive": 4, "polite": 3}),
        (" You are wasting my time, David.", {"respect": 0}),
        (" Well, things are what they are.", {"clear": 0}),
    ],
)
def test_a_sentence_without_errors(sentence: str, expected: dict[str, int]) -> None:
    (part,) = segment(PROMPT, sentence)
    assert part["scores"] == dict.fromkeys(WEIGHTS, NEUTRAL) | expected


def test_weighted_scores_order_one_sentence_responses_nearly_as_gold_does(rng: random.Random) -> None:
    """The weights are what a point is worth in gold: for single sentences both orders are the same but for rounding."""
    values = {}
    for prompt, response in draw_texts(rng, 60):
        for part in segment(prompt, response):
            weighted = sum(WEIGHTS[aspect] * value for aspect, value in part["scores"].items())
            values[part["text"]] = (weighted, score(prompt, part["text"]).total)
    pairs = [(a, b) for a in values.values() for b in values.values() if a[1] - b[1] >= 0.5]
    assert sum(a[0] > b[0] for a, b in pairs) / len(pairs) > 0.99


def test_an_annotator_errs_by_one_point_at_the_stated_rate_and_the_same_for_the_same_seed(rng: random.Random) -> None:
    rows = [{"prompt": p, "chosen": one, "rejected": one} for p, one in draw_texts(rng, 200)]
    seed = str(rng.random())
    noisy = annotate(rows, seed)
    assert noisy == annotate(rows, seed) != annotate(rows, seed + "0")
    offs = [
        abs(part["scores"][aspect] - exact["scores"][aspect])
        for row in noisy
        for side in ("chosen", "rejected")
        for part, exact in zip(row[f"{side}_segments"], segment(row["prompt"], row[side]), strict=True)
        for aspect in WEIGHTS
    ]
    assert set(offs) == {0, 1}
    deviation = (ERROR * (1 - ERROR) / len(offs)) ** 0.5
    assert abs(sum(offs) / len(offs) - ERROR) < 5 * deviation


def test_every_aspect_of_gold_is_scored_and_weighted() -> None:
    assert list(WEIGHTS) == list(Gold.__dataclass_fields__)
    assert sum(WEIGHTS.values()) == pytest.approx(1)
