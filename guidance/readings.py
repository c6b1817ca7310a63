"""Outputs of policies, and of reward models that score every next token at once, for the rows of one step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from steersman.guidance.heads import FrozenHead
from steersman.guidance.rows import Row
from steersman.guidance.transfer import take_rows


class OutputLayer(Protocol):
    """Maps a row of features to an output for every token, or for a few tokens only."""

    @property
    def vocabulary(self) -> int:
        """Tokens that it has an output for: ids below this number."""
        ...

    def warm_up(self) -> None:
        """Compiles on a GPU what the others would otherwise have to."""
        ...

    def every(self, features: torch.Tensor) -> torch.Tensor:
        """features [..., R] → outputs [..., V] float32."""
        ...

    def at(self, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """features [G, R], tokens [G, k] int64 below V → outputs [G, k] float32, reading those tokens' weights only."""
        ...


@dataclass(slots=True)
class _Outputs:
    """What one model returned for some rows, one line each."""

    lines: dict[int, int]
    """By the rows' indices."""
    values: list[torch.Tensor]
    """[n, V] outputs, or [n, R] features where there is a layer; several parts until they are gathered."""
    layer: OutputLayer | None
    adds_base: bool
    """Whether the outputs are added to the base's logits."""

    def take(self, rows: Sequence[Row]) -> torch.Tensor:
        """The values of rows, [len(rows), V or R]."""
        if len(self.values) > 1:
            self.values[:] = [torch.cat(self.values)]
        return take_rows(self.values[0], [self.lines[row.index] for row in rows])


class Readings:
    """Next-token logits, or rewards, by model and row, in the width of the base's vocabulary."""

    def __init__(self, vocabulary: int, logits: torch.Tensor | None = None, hidden: torch.Tensor | None = None) -> None:
        """logits: the base's [B, V], of rows that have not been written yet. hidden: [B, D], the base's hidden states
        that they were computed from; None where the adapter has none."""
        self.vocabulary = vocabulary
        """Width of the base's logits."""
        self.hidden = hidden
        self._logits = logits
        self._outputs: dict[str, _Outputs] = {}

    def add(
        self,
        model: str,
        rows: Sequence[Row],
        values: torch.Tensor,
        layer: OutputLayer | None = None,
        adds_base: bool = False,
    ) -> None:
        """Keeps outputs [len(rows), V of the model], or with `layer` the features [len(rows), R] that it makes outputs
        of when they are needed. Tokens that the model does not have become -inf; those that only it has are padding and
        are dropped. adds_base: the outputs are a change of the base's logits."""
        outputs = self._outputs.setdefault(model, _Outputs({}, [], layer, adds_base))
        for row in rows:
            outputs.lines[row.index] = len(outputs.lines)
        outputs.values.append(self._fit(values) if layer is None else values)

    def has(self, model: str, row: Row) -> bool:
        """Whether the model's outputs for the row are there."""
        outputs = self._outputs.get(model)
        return outputs is not None and row.index in outputs.lines

    def gather(self, model: str, rows: Sequence[Row]) -> torch.Tensor:
        """Outputs [len(rows), V] for every token; every row's are there."""
        outputs = self._outputs[model]
        values = outputs.take(rows)
        if outputs.layer is not None:
            values = self._fit(outputs.layer.every(values))
        return values + self._base(rows).to(values.device) if outputs.adds_base else values

    def gather_at(self, model: str, rows: Sequence[Row], tokens: torch.Tensor) -> torch.Tensor:
        """Outputs [len(rows), k] for the tokens [len(rows), k] int64 of each row."""
        outputs = self._outputs[model]
        values = outputs.take(rows)
        tokens = tokens.to(values.device)
        if outputs.layer is None:
            values = values.gather(1, tokens)
        else:
            width = outputs.layer.vocabulary
            values = outputs.layer.at(values, tokens.clamp(max=width - 1) if width < self.vocabulary else tokens)
            if width < self.vocabulary:
                values = values.masked_fill(tokens >= width, -torch.inf)
        if outputs.adds_base:
            values = values + self._base(rows).to(values.device).gather(1, tokens)
        return values

    def find_head(
        self, model: str, rows: Sequence[Row], device: torch.device
    ) -> tuple[FrozenHead, torch.Tensor] | None:
        """The head on `device` that changes the base's logits, and its features [len(rows), R]; None where the model's
        outputs are something else. Every row's are there."""
        outputs = self._outputs[model]
        if not outputs.adds_base or not isinstance(outputs.layer, FrozenHead) or outputs.layer.device != device:
            return None
        return outputs.layer, outputs.take(rows)

    def _base(self, rows: Sequence[Row]) -> torch.Tensor:
        assert self._logits is not None
        return take_rows(self._logits, [row.index for row in rows])

    def _fit(self, values: torch.Tensor) -> torch.Tensor:
        width = values.shape[-1]
        if width < self.vocabulary:
            values = F.pad(values, (0, self.vocabulary - width), value=-torch.inf)
        return values[:, : self.vocabulary]
