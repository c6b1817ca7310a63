"""Best-of-n and blockwise decoding: samples of the base model, of which a reward model picks one."""

import copy
import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from steersman.guidance.report import BASE_SOURCE
from steersman.guidance.request import BestOfN, Blockwise, GuidanceError
from steersman.server.config import CONFIG_KEY
from steersman.server.registry import LoadedModel
from steersman.server.vllm import CompletionOutput, RequestOutput, RequestOutputKind, SamplingParams

_CONTEXT = 8
"""Prompt tokens that an answer is decoded behind: a tokenizer may write a word differently at the start of a text."""
_SEED_STRIDE = 1_000_003
"""Keeps the seeds of different blocks' samples apart."""


@dataclass(frozen=True)
class Search:
    """A checked request."""

    guidance: BestOfN | Blockwise
    model: LoadedModel
    prompt: list[int]


class Engine(Protocol):
    """What a search needs."""

    @property
    def tokenizer(self) -> Any: ...

    def generate_plain(
        self, prompt: Any, params: SamplingParams, request_id: str, kwargs: dict[str, Any]
    ) -> AsyncGenerator[RequestOutput, None]: ...

    async def score_answers(
        self, model: LoadedModel, prompt: list[int], responses: list[list[int]]
    ) -> tuple[list[float], int]: ...


@dataclass
class _Progress:
    """The answer so far."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    blocks: int = 0
    generated: int = 0
    reward_model_tokens: int = 0
    reward: float = math.nan
    interventions: int = 0
    trace: list[dict[str, Any]] = field(default_factory=list)


def check_search(guidance: BestOfN | Blockwise, params: SamplingParams) -> None:
    """Raises GuidanceError for fields that a choice among samples cannot honour."""
    method = guidance.method
    if params.n > 1:
        raise GuidanceError("n", f"{params.n} with {method}, which returns one answer; leave it at 1")
    if params.temperature == 0:
        raise GuidanceError("temperature", f"0 makes all samples of {method} alike; use one above 0")
    if isinstance(guidance, BestOfN):
        return
    for name, used in (
        ("structured_outputs", params.structured_outputs is not None),
        ("presence_penalty", params.presence_penalty != 0),
        ("frequency_penalty", params.frequency_penalty != 0),
        ("prompt_logprobs", params.prompt_logprobs is not None),
    ):
        if used:
            raise GuidanceError(name, "does not reach over the blocks of blockwise; leave it out or use best_of_n")


async def run_search(
    engine: Engine, search: Search, prompt: Any, params: SamplingParams, request_id: str, kwargs: dict[str, Any]
) -> AsyncGenerator[tuple[RequestOutput, dict[str, Any] | None], None]:
    """The chosen answer as vLLM would stream it, block by block, with the report beside the last output."""
    progress = _Progress()
    limit = params.max_tokens or 1
    block = search.guidance.block if isinstance(search.guidance, Blockwise) else limit
    delta = params.output_kind is RequestOutputKind.DELTA
    finished = False
    while not finished:
        inner = _block_params(params, search, progress, min(block, limit - len(progress.tokens)))
        whole = {**prompt, "prompt_token_ids": [*search.prompt, *progress.tokens]}
        name = f"{request_id}-block-{progress.blocks}"
        async with aclosing(engine.generate_plain(whole, inner, name, kwargs)) as outputs:
            samples: dict[int, CompletionOutput] = {}
            async for output in outputs:
                samples.update({choice.index: choice for choice in output.outputs})
        best = await _choose(engine, search, progress, [samples[index] for index in sorted(samples)])
        before = progress.text
        finish, stop = _extend(engine.tokenizer, search, progress, best, params)
        finished = finish is not None or len(progress.tokens) >= limit
        if finished:
            finish = finish or "length"
        shown = progress.text if finished else progress.text[: _safe_length(progress.text, before, params.stop)]
        if finished or delta:
            yield (
                _output(output, search, progress, best, shown, before, finish, stop, delta),
                (_report(search, progress) if finished else None),
            )
        progress.text = shown


def _block_params(params: SamplingParams, search: Search, progress: _Progress, tokens: int) -> SamplingParams:
    inner = params.clone()
    inner.n, inner.max_tokens, inner.output_kind = search.guidance.n, tokens, RequestOutputKind.FINAL_ONLY
    inner.extra_args = {k: v for k, v in (params.extra_args or {}).items() if k != CONFIG_KEY} or None
    inner.min_tokens = max(0, min(tokens, params.min_tokens - len(progress.tokens)))
    if isinstance(search.guidance, Blockwise):
        # A stop string may lie across two blocks: it is looked for in the whole answer.
        inner.stop = []
    if params.seed is not None:
        inner.seed = (params.seed + progress.blocks * _SEED_STRIDE) % 2**31
    return inner


async def _choose(
    engine: Engine, search: Search, progress: _Progress, samples: Sequence[CompletionOutput]
) -> CompletionOutput:
    answers = [[*progress.tokens, *sample.token_ids] for sample in samples]
    rewards, read = await engine.score_answers(search.model, search.prompt, answers)
    best = max(range(len(samples)), key=lambda n: rewards[n])
    progress.blocks += 1
    progress.generated += sum(len(sample.token_ids) for sample in samples)
    progress.reward_model_tokens += read
    progress.reward = rewards[best]
    progress.interventions += best != 0
    progress.trace.append(
        {
            "chosen": best,
            "samples": [
                {"text": sample.text, "tokens": len(sample.token_ids), "reward": reward}
                for sample, reward in zip(samples, rewards, strict=True)
            ],
        }
    )
    return samples[best]


def _extend(
    tokenizer: Any, search: Search, progress: _Progress, best: CompletionOutput, params: SamplingParams
) -> tuple[str | None, int | str | None]:
    """Adds the chosen sample; returns why and at what the answer ends, if it does."""
    progress.tokens += best.token_ids
    progress.logprobs += best.logprobs or []
    progress.cumulative_logprob += best.cumulative_logprob or 0.0
    ended = best.finish_reason if best.finish_reason != "length" else None
    if isinstance(search.guidance, BestOfN):
        progress.text = best.text
        return best.finish_reason, best.stop_reason
    context = search.prompt[-_CONTEXT:]
    tokens = progress.tokens
    if ended and not params.include_stop_str_in_output and isinstance(best.stop_reason, int):
        tokens = tokens[:-1]
    before = tokenizer.decode(context, skip_special_tokens=params.skip_special_tokens)
    text = tokenizer.decode([*context, *tokens], skip_special_tokens=params.skip_special_tokens)[len(before) :]
    found = [(text.find(stop), stop) for stop in _stops(params.stop) if stop in text]
    progress.text = text
    if found:
        place, stop = min(found)
        progress.text = text[: place + (len(stop) if params.include_stop_str_in_output else 0)]
        return "stop", stop
    return ended, best.stop_reason


def _safe_length(text: str, before: str, stop: Any) -> int:
    """Characters that no later token can take back: neither half of a character nor the start of a stop string."""
    held = max((len(s) for s in _stops(stop)), default=1) - 1
    return max(len(before), len(text.rstrip("\ufffd")) - held)


def _stops(stop: Any) -> list[str]:
    return [stop] if isinstance(stop, str) else list(stop or [])


def _output(
    output: RequestOutput,
    search: Search,
    progress: _Progress,
    best: CompletionOutput,
    shown: str,
    before: str,
    finish: str | None,
    stop: int | str | None,
    delta: bool,
) -> RequestOutput:
    choice = copy.copy(best)
    choice.index, choice.finish_reason, choice.stop_reason = 0, finish, stop if finish == "stop" else None
    choice.text = shown[len(before) :] if delta else shown
    if not delta:
        choice.token_ids = list(progress.tokens)
        choice.logprobs = progress.logprobs if best.logprobs is not None else None
        choice.cumulative_logprob = progress.cumulative_logprob if best.cumulative_logprob is not None else None
    answer = copy.copy(output)
    answer.prompt_token_ids = search.prompt
    answer.outputs, answer.finished = [choice], finish is not None
    return answer


def _report(search: Search, progress: _Progress) -> dict[str, Any]:
    """As other methods report; kl is the bound log n − (n − 1)/n of each choice among n samples."""
    n = search.guidance.n
    report = {
        "method": search.guidance.method,
        "tokens": len(progress.tokens),
        "guided_tokens": len(progress.tokens),
        "interventions": progress.interventions,
        "kl": progress.blocks * (math.log(n) - (n - 1) / n),
        "rewards": {search.model.name: progress.reward},
        "reward_model_tokens": progress.reward_model_tokens,
        "policy_tokens": 0,
        "saved_reward_model_tokens": 0,
        "saved_policy_tokens": 0,
        "sources": {BASE_SOURCE: len(progress.tokens)},
        "switches": 0,
        "generated_tokens": progress.generated,
    }
    return {**report, "trace": progress.trace} if search.guidance.trace else report
