"""What policies, and reward models with a vocabulary head, said in one step."""

from collections.abc import Sequence

import torch

from steersman.guidance.rows import Row
from steersman.guidance.transfer import to_device


class Readings:
    """Next-token logits, or rewards, by model and row, in the width of the base's vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        """Width of the base's logits."""
        self._parts: dict[str, list[torch.Tensor]] = {}
        self._lines: dict[str, dict[int, int]] = {}

    def add(self, model: str, rows: Sequence[Row], logits: torch.Tensor) -> None:
        """Keeps logits [len(rows), V of the model]. Tokens that the model does not have become -inf; those that
        only it has are padding and are dropped."""
        width = logits.shape[-1]
        if width < self.vocabulary:
            logits = torch.nn.functional.pad(logits, (0, self.vocabulary - width), value=-torch.inf)
        lines = self._lines.setdefault(model, {})
        for row in rows:
            lines[row.index] = len(lines)
        self._parts.setdefault(model, []).append(logits[:, : self.vocabulary])

    def has(self, model: str, row: Row) -> bool:
        """Whether the model has been read for the row."""
        return row.index in self._lines.get(model, {})

    def gather(self, model: str, rows: Sequence[Row]) -> torch.Tensor:
        """Logits [len(rows), V]; every row has been read."""
        parts = self._parts[model]
        if len(parts) > 1:
            parts[:] = [torch.cat(parts)]
        lines = [self._lines[model][row.index] for row in rows]
        return parts[0] if lines == list(range(len(parts[0]))) else parts[0][to_device(lines, parts[0].device)]
