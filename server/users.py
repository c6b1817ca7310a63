"""Who uses which model: one that is unloaded goes when nobody does."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from steersman.guidance.request import ModelNotLoaded
from steersman.server.registry import LoadedModel


class ModelUsers:
    """Counts, by name, the requests that may still ask a model."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._idle: dict[str, asyncio.Event] = {}
        self._closed: set[str] = set()

    def count(self, name: str) -> int:
        """Requests that use the model."""
        return self._counts[name]

    @contextmanager
    def using(self, models: Sequence[LoadedModel]) -> Iterator[None]:
        """Keeps models loaded for the duration of the context; raises ModelNotLoaded for one that has gone since it was
        looked up."""
        for model in models:
            if model.name in self._closed:
                raise ModelNotLoaded("guidance", f"{model.name!r} has just been unloaded; see GET /v1/guidance")
        self._counts.update(model.name for model in models)
        try:
            yield
        finally:
            self._counts.subtract(model.name for model in models)
            for model in models:
                if not self._counts[model.name]:
                    del self._counts[model.name]
                    if model.name in self._idle:
                        self._idle[model.name].set()

    async def close(self, name: str) -> None:
        """Waits until nobody uses the model; from then on nobody can begin to."""
        while self._counts[name]:
            self._idle[name] = asyncio.Event()
            await self._idle[name].wait()
        self._idle.pop(name, None)
        self._closed.add(name)

    def open(self, name: str) -> None:
        """A model of this name is loaded."""
        self._closed.discard(name)
