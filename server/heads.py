"""Hidden states of the base model from vLLM: heads are proven on them when they are loaded, and score texts from them.

A text is prefilled as a request of its own, and thrown away after one token. The adapters keep the hidden states of the
positions that it names, by the same way on which they hand them to heads while an answer is decoded.
"""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar
from uuid import uuid4

from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.request import GuidanceError
from steersman.server.config import CONFIG_KEY
from steersman.server.vllm import EngineClient, LoRARequest, RequestOutputKind, SamplingParams

TEXTS_AT_ONCE = 64
"""Texts whose hidden states workers hold for one server at a time: a bound on the memory that they take, far below the
number beyond which the oldest are forgotten."""


_Result = TypeVar("_Result")


def new_key() -> str:
    """A name for a text, which nobody else has."""
    return uuid4().hex


async def prove_head(engine: EngineClient, name: str) -> dict[str, Any]:
    """The description of a head that the workers have loaded, how far it drifts on the base model that is served with
    it. Raises ModelRefused where it does not fit that model.

    All texts of its probe are prefilled together, so that a row that is mistaken for another one shows too.
    """
    described: dict[str, Any] = await _compare(engine, name, "steersman_prove", None)
    return described


async def measure_drift(engine: EngineClient, name: str, adapter: LoRARequest) -> float:
    """How far the outputs of a head that is loaded are from those in training where the base model runs with an adapter
    (LoRA), as a share of their spread. Raises ModelRefused where it cannot be measured."""
    drift: float = await _compare(engine, name, "steersman_measure_drift", adapter)
    return drift


async def run_together(work: Iterable[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """The results of `work`, in its order; where one raises, the others are cancelled."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _compare(engine: EngineClient, name: str, method: str, adapter: LoRARequest | None) -> Any:
    """What a method of the workers returns for a head and the base's hidden states of its probe; raises ModelRefused
    for its refusal."""
    probes = await engine.collective_rpc("steersman_probe", args=(name,))
    texts = next(reply for reply in probes if reply is not None)
    keys = [new_key() for _ in texts]
    await run_together(
        _prefill(engine, text, len(text) - 1, key, adapter) for text, key in zip(texts, keys, strict=True)
    )
    replies = await engine.collective_rpc(method, args=(name, keys))
    refusal = next((reply for reply in replies if isinstance(reply, str)), None)
    if refusal is not None:
        raise ModelRefused(refusal)
    return next(reply for reply in replies if reply is not None)


async def score_by_head(
    engine: EngineClient, name: str, prompt: Sequence[int], response: Sequence[int], start: int, key: str
) -> list[float] | str:
    """A reward head's value after each token of `response` from index `start` on: one forward of the base; or why it
    could not be had. The workers keep hidden states under `key` until the values are computed of them.

    Raises GuidanceError for a text that is too long for the base.
    """
    text = [*prompt, *response[:-1]]
    try:
        await _prefill(engine, text, len(prompt) + start - 1, key)
    except ValueError as error:
        raise GuidanceError("responses", f"cannot be read by the base model: {error}") from error
    replies = await engine.collective_rpc("steersman_score_hidden", args=(name, key, list(response[start:])))
    return next((reply for reply in replies if reply is not None), "the base's hidden states were not handed over")


async def forget_text(engine: EngineClient, key: str) -> None:
    """Lets the workers forget the hidden states of a text whose values nobody waits for any more."""
    await engine.collective_rpc("steersman_forget_hidden", args=(key,))


async def _prefill(
    engine: EngineClient, tokens: Sequence[int], start: int, key: str, adapter: LoRARequest | None = None
) -> None:
    """Lets the workers keep the hidden states from position `start` on, under `key`."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        detokenize=False,
        # What the prefix cache holds is not computed again; the last position always is.
        skip_reading_prefix_cache=start < len(tokens) - 1,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={CONFIG_KEY: {"key": key, "span": [start, len(tokens)]}},
    )
    prompt = {"type": "token", "prompt_token_ids": list(tokens)}
    request_id = f"hidden-{key}"
    async with aclosing(engine.generate(prompt, params, request_id, lora_request=adapter)) as outputs:
        async for _ in outputs:
            pass
