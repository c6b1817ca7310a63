"""Supervision in two dimensions for the world's pairs: each sentence of a response scored on each aspect (2D-DPO).

Scores are an annotator's, from 0 to 4, with 2 for a sentence that neither helps nor harms. What a sentence adds to an
aspect's gold, as a share of the most that it can add or take away, moves its score up or down by as large a share of 2.
"""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

from steersman.training.world.gold import Gold, score_sentences

WEIGHTS = {"helpful": 0.3, "attentive": 0.15, "polite": 0.15, "respect": 0.25, "clear": 0.15}
"""About what a point of each score is worth in gold."""

NEUTRAL, HIGHEST = 2, 4
ERROR = 0.1
"""Chance that an annotator is a point off."""

# What one sentence takes away at worst and adds at best; where it can do neither, its score stays on one side of 2.
_RANGES = {
    "helpful": (-1.0, 1.5),
    "attentive": (-0.5, 0.5),
    "polite": (0.0, 0.5),
    "respect": (-1.0, 0.0),
    "clear": (-0.5, 0.0),
}


def annotate(rows: list[dict[str, Any]], seed: str) -> list[dict[str, Any]]:
    """The rows with `chosen_segments` and `rejected_segments`; `seed` draws the annotator's errors."""
    rng = random.Random(f"annotation/{seed}")
    return [
        row | {f"{side}_segments": segment(row["prompt"], row[side], rng) for side in ("chosen", "rejected")}
        for row in rows
    ]


def segment(prompt: str, response: str, rng: random.Random | None = None) -> list[dict[str, Any]]:
    """A response's sentences as `text`, which join to the response, and `scores` by aspect; without `rng` no errors."""
    sentences = score_sentences(prompt, response)
    ends = [sentence.end for sentence in sentences[:-1]]
    starts, ends = [0, *ends], [*ends, len(response)]  # white space at the end belongs to the last sentence
    return [
        {"text": response[start:end], "scores": _scores(sentence.gold, rng)}
        for start, end, sentence in zip(starts, ends, sentences, strict=False)  # none of a response without letters
    ]


def _scores(gold: Gold, rng: random.Random | None) -> dict[str, int]:
    return {aspect: _err(_score(added, *_RANGES[aspect]), rng) for aspect, added in asdict(gold).items()}


def _score(added: float, worst: float, best: float) -> int:
    if added == 0:
        return NEUTRAL
    share = added / best if added > 0 else -added / worst
    return max(0, min(HIGHEST, round(NEUTRAL + NEUTRAL * share)))


def _err(score: int, rng: random.Random | None) -> int:
    """Off by a point with the chance of an error: up or down, inwards at either end."""
    if rng is None or rng.random() >= ERROR:
        return score
    step = rng.choice((-1, 1))
    return score + step if 0 <= score + step <= HIGHEST else score - step
