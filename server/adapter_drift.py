"""Heads where the base model runs with an adapter (LoRA), which changes the hidden states that a head was trained on.
How far the head's outputs drift there is measured before the first request that they would guide."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.head_models import LARGEST_DRIFT, NOTICEABLE
from steersman.guidance.request import GuidanceError
from steersman.server.heads import measure_drift
from steersman.server.vllm import EngineClient, LoRARequest

logger = logging.getLogger(__name__)

FIELD = "model"
"""The request's field that names an adapter."""


@dataclass(frozen=True)
class _Measured:
    adapter: LoRARequest
    """As it was loaded: one that is loaded again under the same name is another object."""
    drift: float
    """As a share of the spread of the head's outputs."""


class AdapterDrift:
    """The drift of each head on each adapter that requests have combined."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._measured: dict[tuple[str, str], _Measured] = {}
        """By head and adapter."""
        self._measuring = asyncio.Lock()

    async def measure(self, heads: Sequence[str], adapter: LoRARequest) -> None:
        """Measures what has not been measured yet. Raises GuidanceError for a head that does not fit the adapter."""
        async with self._measuring:
            for head in heads:
                if self._find(head, adapter) is None:
                    try:
                        drift = await measure_drift(self._engine, head, adapter)
                    except (ModelRefused, ValueError) as error:
                        raise GuidanceError(FIELD, f"{adapter.lora_name!r} cannot be guided: {error}") from error
                    self._measured[head, adapter.lora_name] = _Measured(adapter, drift)
                    if NOTICEABLE < drift <= LARGEST_DRIFT:
                        logger.warning(
                            "%r: on the adapter %r its outputs are off by %.2g of their spread",
                            *(head, adapter.lora_name, drift),
                        )
        self.check(heads, adapter)

    def check(self, heads: Sequence[str], adapter: LoRARequest) -> None:
        """Raises GuidanceError for a head that does not fit the adapter, or was not measured on it."""
        for head in heads:
            measured = self._find(head, adapter)
            if measured is None:
                raise GuidanceError(
                    FIELD,
                    f"{adapter.lora_name!r} was loaded just now, and how far {head!r} is off there was not measured "
                    "yet; send the request again",
                )
            if not measured.drift <= LARGEST_DRIFT:
                raise GuidanceError(
                    FIELD,
                    f"{adapter.lora_name!r} changes the hidden states that {head!r} reads: its outputs are off by "
                    f"{measured.drift:.2g} of their spread, at most {LARGEST_DRIFT:g} is allowed; send it to the base "
                    "model, or use a reward model or policy that is no head",
                )

    def forget(self, head: str) -> None:
        """A head was unloaded: its name may come to mean another one."""
        self._measured = {key: measured for key, measured in self._measured.items() if key[0] != head}

    def describe(self, head: str) -> dict[str, float]:
        """The drift of a head by adapter."""
        return {name: round(measured.drift, 6) for (own, name), measured in self._measured.items() if own == head}

    def _find(self, head: str, adapter: LoRARequest) -> _Measured | None:
        measured = self._measured.get((head, adapter.lora_name))
        return measured if measured is not None and measured.adapter is adapter else None
