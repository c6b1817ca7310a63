"""Hidden states of the base at given positions of a text, kept while vLLM prefills it: what heads score texts from."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

_KEPT = 256
"""Texts whose hidden states have not been collected yet; beyond it the oldest are dropped."""


@dataclass(frozen=True)
class Span:
    """Positions of a text whose hidden states are kept: from `start` to before `stop`."""

    key: Hashable
    start: int
    stop: int


@dataclass
class _Kept:
    span: Span
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    """Hidden state [D] of each position that has been computed."""


class HiddenStateStore:
    """Hidden states of texts, from the start of their prefill until they are collected."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()

    def expect(self, span: Span) -> None:
        """Begins a text; one of the same key is begun anew."""
        self._kept[span.key] = _Kept(span)
        self._kept.move_to_end(span.key)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)

    def keep(self, key: Hashable, first: int, hidden: torch.Tensor) -> None:
        """Keeps those of `hidden` [n, D], of the positions from `first` on, that the text's span holds. A position that
        is computed again, behind a preemption, replaces what was kept."""
        kept = self._kept.get(key)
        if kept is None:
            return
        begin, end = max(first, kept.span.start), min(first + len(hidden), kept.span.stop)
        if begin < end:
            # A copy: the runner writes the next step's hidden states to the same memory.
            rows = hidden[begin - first : end - first].clone()
            kept.states.update(zip(range(begin, end), rows, strict=True))

    def __contains__(self, key: Hashable) -> bool:
        """Whether the text is known."""
        return key in self._kept

    def forget(self, key: Hashable) -> None:
        """Lets go of a text, known or not."""
        self._kept.pop(key, None)

    def take(self, key: Hashable) -> torch.Tensor:
        """The text's hidden states [stop − start, D], which are forgotten.

        Raises KeyError for an unknown text and RuntimeError where some states were not computed.
        """
        kept = self._kept.pop(key)
        span = kept.span
        missing = [position for position in range(span.start, span.stop) if position not in kept.states]
        if missing:
            raise RuntimeError(f"the base's hidden state at position {missing[0]} of the text was not computed")
        return torch.stack([kept.states[position] for position in range(span.start, span.stop)])
