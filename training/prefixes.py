"""Partial sequences: where a pair of responses may be cut, and which of the cuts are trained on.

A pair has as many partial sequences as its longer response has tokens. Both responses are cut at the same number i of
tokens; past its own end a response stays whole, end token included. A cut prefix is given no end token.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from steersman.training.data.preferences import TokenizedPreference
from steersman.training.data.segments import SegmentedResponse

ALL_PREFIXES = 0  # in place of a number of them
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the longer response, at which accuracy is measured


def cut(response: Sequence[int], tokens: int) -> list[int]:
    """The first `tokens` token ids of a response, or all of a shorter one."""
    return list(response[:tokens])


def tokens_at(share: float, longer: int) -> int:
    """The cut, at least one token, at a share of the longer response of a pair."""
    return max(1, math.ceil(share * longer))


def truncate(rows: Sequence[TokenizedPreference], keep: float) -> list[TokenizedPreference]:
    """The beginnings of all responses (Shallow Preference Signals, §3.3): up to 1 a share of each one's own tokens, at
    least one of them, above 1 a number of tokens. A cut is given no end token: a policy would learn to stop there."""

    def tokens(response: Sequence[int]) -> int:
        return tokens_at(keep, len(response)) if keep <= 1 else int(keep)

    return [
        replace(
            row,
            chosen=cut(row.chosen, tokens(row.chosen)),
            rejected=cut(row.rejected, tokens(row.rejected)),
            chosen_segments=cut_segments(row.chosen_segments, tokens(row.chosen)),
            rejected_segments=cut_segments(row.rejected_segments, tokens(row.rejected)),
        )
        for row in rows
    ]


def cut_segments(segments: SegmentedResponse | None, tokens: int) -> SegmentedResponse | None:
    """The segments of a response's first `tokens` tokens; one that is divided keeps its scores for what is left."""
    if segments is None:
        return None
    whole = sum(end < tokens for end in segments.ends)
    ends = [*segments.ends[:whole], *[min(end, tokens) for end in segments.ends[whole : whole + 1]]]
    return SegmentedResponse(ends, segments.scores[: whole + 1])


def draw_subset(longer: Sequence[int], ratio: float, seed: int) -> list[tuple[int, int]]:
    """A random subset of all partial sequences, `ratio` times as many as there are pairs: sorted (pair, i), i ≥ 1.

    longer: for each pair the length of its longer response. Drawn without replacement, each alike.
    """
    ends: list[int] = []
    for length in longer:
        ends.append((ends[-1] if ends else 0) + length)
    total = ends[-1] if ends else 0
    drawn = sorted(random.Random(seed).sample(range(total), min(total, round(ratio * len(longer)))))
    subset, pair = [], 0
    for index in drawn:
        while index >= ends[pair]:
            pair += 1
        subset.append((pair, index - (ends[pair] - longer[pair]) + 1))
    return subset


def draw_cuts(longer: int, count: int, rng: random.Random) -> list[int]:
    """`count` different cuts of one pair, sorted; all of them where the longer response has no more tokens, or for
    ALL_PREFIXES."""
    every = range(1, longer + 1)
    return list(every) if count == ALL_PREFIXES else sorted(rng.sample(every, min(longer, count)))
