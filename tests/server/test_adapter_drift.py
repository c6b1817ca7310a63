"""Heads on adapters (LoRA) of the base: measured before they guide anything, refused where they drift too far."""

import asyncio
import random
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from steersman.guidance.head_models import LARGEST_DRIFT
from steersman.guidance.request import GuidanceError
from steersman.server.adapter_drift import AdapterDrift
from steersman.server.vllm import LoRARequest

HEADS = ["tops", "tilts"]


class Engine:
    """vLLM's, whose first worker does not sample: prefills texts, and has the drift of each head."""

    def __init__(self, drifts: dict[str, float | str]) -> None:
        self.drifts = drifts
        self.prefilled: list[tuple[list[int], str]] = []
        """Each text and the adapter that it was prefilled with."""
        self.measured: list[str] = []

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        if method == "steersman_probe":
            return [None, [[5, 6], [7]]]
        assert method == "steersman_measure_drift"
        name, keys = args
        assert len(set(keys)) == 2
        self.measured.append(name)
        return [None, self.drifts[name]]

    async def generate(
        self, prompt: Any, params: Any, request_id: str, lora_request: LoRARequest
    ) -> AsyncGenerator[None, None]:
        await asyncio.sleep(0)
        self.prefilled.append((prompt["prompt_token_ids"], lora_request.lora_name))
        yield None


def _adapter(name: str) -> LoRARequest:
    return LoRARequest(name, 1, "folder")


def _measure(drift: AdapterDrift, adapter: LoRARequest, heads: list[str] = HEADS) -> None:
    asyncio.run(drift.measure(heads, adapter))


def test_each_head_is_measured_with_the_adapter_once(rng: random.Random) -> None:
    engine = Engine({name: rng.uniform(0, LARGEST_DRIFT) for name in HEADS})
    drift: Any = AdapterDrift(engine)  # type: ignore[arg-type]
    french, formal = _adapter("french"), _adapter("formal")

    async def two_at_once() -> None:
        await asyncio.gather(drift.measure(HEADS, french), drift.measure(HEADS, french))

    asyncio.run(two_at_once())
    assert sorted(engine.measured) == sorted(HEADS)
    assert sorted(engine.prefilled) == [([5, 6], "french")] * 2 + [([7], "french")] * 2
    _measure(drift, formal, ["tops"])
    assert engine.measured[2:] == ["tops"]
    drift.check(HEADS, french)
    assert drift.describe("tops") == pytest.approx(dict.fromkeys(("french", "formal"), engine.drifts["tops"]), abs=1e-6)
    assert drift.describe("tilts") == pytest.approx({"french": engine.drifts["tilts"]}, abs=1e-6)


@pytest.mark.parametrize("found", [1.01 * LARGEST_DRIFT, float("nan")])
def test_a_head_that_drifts_too_far_is_refused_with_the_way_out(found: float) -> None:
    engine = Engine({"tops": 0.0, "tilts": found})
    drift = AdapterDrift(engine)  # type: ignore[arg-type]
    adapter = _adapter("french")
    for _ in range(2):
        with pytest.raises(GuidanceError, match=r"'french' changes the hidden states.*'tilts'.*base") as caught:
            _measure(drift, adapter)
        assert caught.value.field == "model"
    assert engine.measured == HEADS, "once"
    _measure(drift, adapter, ["tops"])


def test_an_adapter_that_was_not_measured_is_refused() -> None:
    engine = Engine({"tops": 0.0, "tilts": "the base's hidden states were not handed over"})
    drift = AdapterDrift(engine)  # type: ignore[arg-type]
    with pytest.raises(GuidanceError, match="send the request again") as caught:
        drift.check(["tops"], _adapter("french"))
    assert caught.value.field == "model"
    with pytest.raises(GuidanceError, match="'french' cannot be guided: the base's hidden states"):
        _measure(drift, _adapter("french"), ["tilts"])
    drift.check([], _adapter("french"))


def test_what_is_loaded_anew_under_a_name_is_measured_anew() -> None:
    engine = Engine({"tops": 0.01, "tilts": 0.02})
    drift = AdapterDrift(engine)  # type: ignore[arg-type]
    first, second = _adapter("french"), _adapter("french")
    _measure(drift, first)
    with pytest.raises(GuidanceError, match="send the request again"):
        drift.check(HEADS, second)
    _measure(drift, second)
    assert engine.measured == HEADS * 2
    drift.forget("tops")
    drift.check(["tilts"], second)
    _measure(drift, second)
    assert engine.measured[4:] == ["tops"]
