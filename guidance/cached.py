"""What reward models and policies that read over a paged cache have in common."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from steersman.guidance.auxiliary import CausalModel, Prefix
from steersman.guidance.cache import PagedCache
from steersman.guidance.checkpoints import find_language_head
from steersman.guidance.verification import eager_attention, verify


class CachedModel:
    """A named model over a CausalModel."""

    kind: str

    def __init__(self, model: CausalModel, name: str) -> None:
        self.name = name
        self.model = model
        self.window = model.window

    @property
    def cache(self) -> PagedCache:
        """What it has read."""
        return self.model.cache

    def covers(self, key: Hashable, length: int) -> bool:
        """Whether the first `length` tokens of a request are cached."""
        return self.model.covers(key, length)

    def release(self, key: Hashable, tokens: Sequence[int] | None = None, failed: bool = False) -> None:
        """Forgets a request; with `tokens` later requests that begin alike may reuse its cache, unless it failed."""
        self.model.release(key, tokens, failed)

    def describe(self) -> dict[str, Any]:
        """Facts for users: kind, window, cache size."""
        return {"name": self.name, "kind": self.kind, **self.model.describe()}


class NextTokenModel(CachedModel):
    """A causal language model that says something of every next token, from one new token a row."""

    def __init__(self, model: Any, label: str, name: str, cache_bytes: int, max_rows: int) -> None:
        super().__init__(CausalModel(model, label, cache_bytes, max_rows, find_language_head(model)), name)
        self.vocabulary: int = model.config.get_text_config().vocab_size

        def evaluate(ids: torch.Tensor) -> torch.Tensor:
            ids = ids.to(self.model.device)
            with eager_attention(model):
                return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].float()

        with torch.inference_mode():
            verify(self.model, evaluate, self.vocabulary, candidates=0)

    def read(self, prefixes: Sequence[Prefix], last: torch.Tensor | None = None) -> tuple[torch.Tensor, list[int]]:
        """See CausalModel.read: outputs [G, V of the model], one for every next token."""
        return self.model.read(prefixes, last)
