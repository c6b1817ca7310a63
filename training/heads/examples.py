"""What one row of the data is to the training of a head: stored hidden states, and the tokens that follow them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steersman.training.configuration import ConfigError
from steersman.training.data.preferences import TokenizedPreference
from steersman.training.heads.features import Features, Reading

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Example:
    """One row. A place is a hidden state with the tokens behind it whose outputs take part in the loss."""

    rows: Tensor
    """[n] int64: of the features, one for each place."""
    tokens: Tensor
    """[n, k] int64."""
    sides: Tensor
    """[n] int64: 0 for places of the chosen response, 1 for those of the rejected one; 0 where there are no pairs."""
    targets: Tensor | None = None
    """[n, k] or [n, 1] float32: what outputs should be, where the data say it."""


class Collator:
    """Joins examples; their places are not padded but lie one behind the other."""

    def __init__(self, features: Features) -> None:
        self._states = features.states

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """`hidden` [n, D] in the precision of the features, `tokens` [n, k], `targets` if there are any, and `owners`
        [n]: 2·b + side for places of the b-th example."""
        rows = torch.cat([example.rows for example in examples])
        batch = {
            "hidden": self._states[rows],
            "tokens": torch.cat([example.tokens for example in examples]),
            "owners": torch.cat([2 * b + example.sides for b, example in enumerate(examples)]),
        }
        targets: list[Any] = [example.targets for example in examples]
        return batch if targets[0] is None else batch | {"targets": torch.cat(targets)}


def by_side(values: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """The values [n, …] of the chosen and of the rejected responses' places, in their order."""
    rejected = owners % 2 == 1
    return values[~rejected], values[rejected]


def read_response(prompt: Sequence[int], response: Sequence[int], cuts: Sequence[int] | None = None) -> Reading:
    """The reading of a response at the last token of each of its prefixes of `cuts` tokens, by default of all; past its
    own end a response stays whole. Raises ConfigError for a prompt of no tokens: nothing would precede the first."""
    if not prompt:
        raise ConfigError("a prompt has no tokens: a head reads what the base made of the tokens before")
    ends = range(1, len(response) + 1) if cuts is None else sorted({min(cut, len(response)) for cut in cuts})
    return Reading([*prompt, *response], [len(prompt) + end - 1 for end in ends])


def read_pair(row: TokenizedPreference, cuts: Sequence[int] | None = None) -> tuple[Reading, Reading]:
    """The readings of both responses."""
    return read_response(row.prompt, row.chosen, cuts), read_response(row.prompt, row.rejected, cuts)


def tokens_of(reading: Reading) -> Tensor:
    """The tokens [n] at all places of a reading."""
    return torch.tensor([reading.ids[place] for place in reading.places])


def whole_pair(features: Features, readings: Sequence[Reading], pair: int) -> Example:
    """All places of both responses of a pair: its readings are 2·pair and 2·pair + 1."""
    own = (2 * pair, 2 * pair + 1)
    rows = [features.rows(n, torch.arange(len(readings[n].places))) for n in own]
    return Example(
        torch.cat(rows),
        torch.cat([tokens_of(readings[n]) for n in own]).unsqueeze(1),
        torch.cat([torch.full_like(part, side) for side, part in enumerate(rows)]),
    )


def cut_pair(features: Features, readings: Sequence[Reading], pair: int, cuts: Sequence[int], prompt: int) -> Example:
    """Both responses of a pair at the ends of their prefixes of `cuts` tokens, equally many places of both."""
    rows, tokens, sides = [], [], []
    for side, reading in enumerate(readings[2 * pair : 2 * pair + 2]):
        length = len(reading.ids) - prompt
        places = [prompt + min(cut, length) - 1 for cut in cuts]
        indices = torch.tensor([bisect_left(reading.places, place) for place in places])
        rows.append(features.rows(2 * pair + side, indices))
        tokens.append(torch.tensor([reading.ids[place] for place in places]))
        sides.append(torch.full_like(indices, side))
    return Example(torch.cat(rows), torch.cat(tokens).unsqueeze(1), torch.cat(sides))
