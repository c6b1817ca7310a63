"""Responses cut into segments that are scored by aspect: the supervision of 2D-DPO (§3.1).

In a file: `chosen_segments` and `rejected_segments`, each a list of {"text": str, "scores": {ASPECT: 0 to 4}} whose
texts, joined, are the response.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from steersman.training.data.sources import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASPECTS = ("helpfulness", "correctness", "safety", "completeness", "clarity")
"""Those of 2D-DPO, in the order of its weights."""

HIGHEST = 4


@dataclass(frozen=True)
class SegmentedResponse:
    """Where a tokenised response's segments end, and what each scored.

    Segment k is the tokens `ends[k-1]` to `ends[k] - 1` of the response (from 0 for the first): at least one. The last
    of `ends` is the response's length, its end token included. `scores[k][a]` is from 0 to 4; a counts the aspects in
    the order that the caller of `load_preferences` gave.
    """

    ends: list[int]
    scores: list[list[float]]


def find_segment_problems(name: str, segments: Any, response: str | None) -> Iterator[str]:
    """All that is wrong with the field `name`, the segments of a response; None where it isn't of one message."""
    if not isinstance(segments, list) or not segments:
        yield f"'{name}' has no segments: a list of objects with text and scores"
        return
    for number, segment in enumerate(segments, 1):
        for problem in _find_problems(segment):
            yield f"segment {number} of '{name}' {problem}"
    texts = [segment["text"] for segment in segments if isinstance(segment, dict) and "text" in segment]
    if len(texts) < len(segments) or not all(isinstance(text, str) for text in texts):
        return
    if response is None:
        yield f"'{name}' needs a response of one message"
    elif "".join(texts) != response:
        same = list(map(str.__eq__, "".join(texts), response))
        shared = same.index(False) if False in same else len(same)
        yield f"the texts of '{name}' joined are not the response: they differ after {shared} characters"
    scored = [set(segment["scores"]) for segment in segments if isinstance(segment.get("scores"), dict)]
    everywhere: set[str] = set().union(*scored)
    for number, segment in enumerate(segments, 1):
        for aspect in sorted(everywhere - set(segment.get("scores") or {})):
            yield f"segment {number} of '{name}' has no score for '{aspect}', others have"


def scored_aspects(segments: Sequence[dict[str, Any]]) -> set[str]:
    """The aspects for which every one of the segments has a score."""
    return set.intersection(*(set(segment.get("scores", {})) for segment in segments))


def place_segments(
    segments: Sequence[dict[str, Any]], text: str, tokenizer: PreTrainedTokenizerBase, aspects: Sequence[str]
) -> SegmentedResponse:
    """The segments of a response that is tokenised as `text`, which a chat template may have put something around.

    A token belongs to the segment in which its last character lies. Raises DataError, without a place.
    """
    content = "".join(segment["text"] for segment in segments)
    start = text.find(content.strip())  # templates trim what they are given
    if start < 0:
        raise DataError("the chat template rewrites the response: its segments can't be found")
    shift = start - (len(content) - len(content.lstrip()))
    bounds = [shift + end for end in accumulate(len(segment["text"]) for segment in segments)][:-1]
    last = [max(end - 1, 0) for _, end in _offsets(text, tokenizer)]
    owners = [bisect_right(bounds, character) for character in accumulate(last, max)]
    ends = [bisect_right(owners, number) for number in range(len(segments))]
    for number, (before, end) in enumerate(pairwise([0, *ends]), 1):
        if end == before:
            raise DataError(f"segment {number} has no token of its own: join it with the one after it")
    return SegmentedResponse(ends, [[float(segment["scores"][aspect]) for aspect in aspects] for segment in segments])


def _offsets(text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    if not tokenizer.is_fast:
        raise DataError("segments need a tokenizer that tells its tokens' offsets: a fast one (tokenizer.json)")
    offsets: list[tuple[int, int]] = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    return offsets


def _find_problems(segment: Any) -> Iterator[str]:
    if not isinstance(segment, dict) or not isinstance(segment.get("text"), str):
        yield "is not an object with a text"
        return
    if not segment["text"].strip():
        yield "is empty"
    scores = segment.get("scores", {})
    if not isinstance(scores, dict):
        yield "has scores that are not an object of aspects and numbers"
        return
    for aspect, score in scores.items():
        number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        if not number or not 0 <= score <= HIGHEST:
            yield f"has {score!r} for '{aspect}': a score is a number from 0 to {HIGHEST}"
