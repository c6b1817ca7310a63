"""What reward models and policies that read over a paged cache have in common."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch

from steersman.guidance.auxiliary import CausalModel, Prefix
from steersman.guidance.cache import PagedCache
from steersman.guidance.checkpoints import find_language_head
from steersman.guidance.readings import OutputLayer
from steersman.guidance.verification import verify


class CachedModel(ABC):
    """A named model over a CausalModel."""

    kind: str

    def __init__(self, model: CausalModel, name: str) -> None:
        self.name = name
        self.model = model
        self.window = model.window
        self.vocabulary = model.vocabulary
        """Token ids below this number can be read."""

    @property
    def cache(self) -> PagedCache:
        """What it has read."""
        return self.model.cache

    @abstractmethod
    def check(self) -> None:
        """Compares cached outputs with plain forwards; raises ModelRefused where they differ."""

    def warm_up(self) -> None:
        """See CausalModel.warm_up."""
        self.model.warm_up()

    def capture(self) -> Iterator[None]:
        """See CausalModel.capture."""
        return self.model.capture()

    def covers(self, key: Hashable, length: int) -> bool:
        """Whether the first `length` tokens of a request are cached."""
        return self.model.covers(key, length)

    def release(self, key: Hashable, tokens: Sequence[int] | None = None, failed: bool = False) -> None:
        """Forgets a request; with `tokens` later requests that begin alike may reuse its cache, unless it failed."""
        self.model.release(key, tokens, failed)

    def describe(self) -> dict[str, Any]:
        """Facts for users: kind, vocabulary, window, cache size."""
        return {"name": self.name, "kind": self.kind, "vocabulary": self.vocabulary, **self.model.describe()}


class NextTokenModel(CachedModel):
    """A causal language model that says something of every next token, from one new token a row."""

    def __init__(
        self, model: Any, label: str, name: str, cache_bytes: int, max_rows: int, *, every_token: bool
    ) -> None:
        """every_token: whether outputs of all tokens are computed in the forward; else `layer` computes those that are
        needed."""
        head = find_language_head(model)
        self.layer: OutputLayer | None = None if every_token else head
        super().__init__(CausalModel(model, label, cache_bytes, max_rows, head if every_token else _keep), name)

    def warm_up(self) -> None:
        """See CausalModel.warm_up."""
        super().warm_up()
        if self.layer is not None:
            self.layer.warm_up()

    @torch.inference_mode()
    def check(self) -> None:
        """See CachedModel.check."""
        verify(self.model, self.vocabulary, branching=False, finish=_keep if self.layer is None else self.layer.every)

    def read(self, prefixes: Sequence[Prefix], last: torch.Tensor | None = None) -> tuple[torch.Tensor, list[int]]:
        """See CausalModel.read: outputs [G, V of the model], one for every next token, or features [G, D] of which
        `layer` computes them."""
        return self.model.read(prefixes, last)


def _keep(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def make_ready(model: Any) -> None:
    """Captures a reward model's or policy's step where the device can, and checks it as it will run; raises
    ModelRefused."""
    model.warm_up()
    for _ in model.capture():
        pass
    model.check()
