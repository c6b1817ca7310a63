"""Best-of-n and blockwise decoding: samples of the base model, of which a reward model picks one."""

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from steersman.guidance.report import BASE_SOURCE
from steersman.guidance.request import BestOfN, Blockwise, GuidanceError, TooLong, UnreadableToken, UnscorableText
from steersman.guidance.tokenizers import find_unreadable, name_model
from steersman.server.answers import Answer
from steersman.server.config import CONFIG_KEY
from steersman.server.registry import SHORTER, LoadedModel
from steersman.server.vllm import CompletionOutput, RequestOutput, RequestOutputKind, SamplingParams

_CHARACTER = 4
"""The most tokens that one character is made of: its bytes in UTF-8."""
_SEED_STRIDE = 1_000_003
"""Keeps the seeds of different blocks' samples apart."""


@dataclass(frozen=True)
class Search:
    """A checked request."""

    guidance: BestOfN | Blockwise
    model: LoadedModel
    prompt: list[int]
    source: dict[str, Any] | None = None
    """What the prompt was made of, where the model reads text."""
    length_field: str = "max_tokens"
    """The request's field that bounds how long the answer becomes."""


class Engine(Protocol):
    """What a search needs."""

    @property
    def tokenizer(self) -> Any: ...

    def generate_plain(
        self, prompt: Any, params: SamplingParams, request_id: str, kwargs: dict[str, Any]
    ) -> AsyncGenerator[RequestOutput, None]: ...

    async def score_answers(
        self, model: LoadedModel, prompt: list[int], responses: list[list[int]], source: dict[str, Any] | None = None
    ) -> tuple[list[float], int]: ...


def check_search(guidance: BestOfN | Blockwise, params: SamplingParams, tokenizer: Any, constraint: str | None) -> None:
    """Raises GuidanceError for fields that a choice among samples cannot honour.

    tokenizer: the base model's. constraint: the field by which the request constrains its answer's form.
    """
    method = guidance.method
    if params.n > 1:
        raise GuidanceError("n", f"{params.n} with {method}, which returns one answer; leave it at 1")
    if params.temperature == 0:
        raise GuidanceError("temperature", f"0 makes all samples of {method} alike; use one above 0")
    if isinstance(guidance, BestOfN):
        return
    for name, what, used in (
        (constraint or "structured_outputs", "a constraint", params.structured_outputs is not None),
        ("presence_penalty", "it", params.presence_penalty != 0),
        ("frequency_penalty", "it", params.frequency_penalty != 0),
        ("repetition_detection", "it", params.repetition_detection is not None),
        ("thinking_token_budget", "it", params.thinking_token_budget is not None),
        ("bad_words", "an entry of several tokens", _has_bad_phrase(params, tokenizer)),
    ):
        if used:
            raise GuidanceError(
                name, f"{what} does not reach over the blocks of blockwise; leave it out or use best_of_n"
            )


def _has_bad_phrase(params: SamplingParams, tokenizer: Any) -> bool:
    """Whether one of bad_words is of several tokens, the first of which an earlier block may end with."""
    words = params.clone()
    words.update_from_tokenizer(tokenizer)
    return any(len(word) > 1 for word in words.bad_words_token_ids or ())


async def run_search(
    engine: Engine, search: Search, prompt: Any, params: SamplingParams, request_id: str, kwargs: dict[str, Any]
) -> AsyncGenerator[tuple[RequestOutput, dict[str, Any] | None], None]:
    """The chosen answer as vLLM would stream it, block by block, with the report beside the last output."""
    choice = _Choice(engine, search)
    answer: Answer | None = None
    while answer is None or not answer.finished:
        tokens = [] if answer is None else answer.tokens
        inner = _block_params(params, search, choice.blocks, len(tokens))
        if engine.tokenizer.decode(tokens[-_CHARACTER:]).endswith("\ufffd"):
            # vLLM repeats text of a prompt that ends within a character, and would find a stop string there.
            inner.stop = []
        whole = {**prompt, "prompt_token_ids": [*search.prompt, *tokens]}
        name = f"{request_id}-block-{choice.blocks}"
        async with aclosing(engine.generate_plain(whole, inner, name, kwargs)) as outputs:
            samples: dict[int, CompletionOutput] = {}
            async for output in outputs:
                samples.update({sample.index: sample for sample in output.outputs})
        if answer is None:
            answer = Answer(engine.tokenizer, request_id, params, output)
        best = await choice.make(answer, [samples[index] for index in sorted(samples)])
        shown = answer.extend(best)
        if shown is not None:
            shown.metrics = output.metrics
            yield shown, choice.report(len(answer.tokens)) if answer.finished else None


def _block_params(params: SamplingParams, search: Search, blocks: int, tokens: int) -> SamplingParams:
    """The sampling parameters of the next block, behind so many `blocks` of so many `tokens`."""
    inner = params.clone()
    left = (params.max_tokens or 1) - tokens
    inner.n, inner.output_kind = search.guidance.n, RequestOutputKind.FINAL_ONLY
    inner.max_tokens = min(search.guidance.block, left) if isinstance(search.guidance, Blockwise) else left
    inner.min_tokens = max(0, min(inner.max_tokens, params.min_tokens - tokens))
    inner.extra_args = {k: v for k, v in (params.extra_args or {}).items() if k != CONFIG_KEY} or None
    if params.seed is not None:
        inner.seed = (params.seed + blocks * _SEED_STRIDE) % 2**31
    return inner


class _Choice:
    """Chooses the best sample of each block, and counts."""

    def __init__(self, engine: Engine, search: Search) -> None:
        self.blocks = 0
        self._engine = engine
        self._search = search
        self._generated = 0
        self._unreadable = 0
        self._read = 0
        self._reward = math.nan
        self._interventions = 0
        self._trace: list[dict[str, Any]] = []

    async def make(self, answer: Answer, samples: Sequence[CompletionOutput]) -> CompletionOutput:
        """The best of a block's samples behind `answer`, trimmed to what would be shown of it.

        Raises UnreadableToken or TooLong where the reward model can read none of them.
        """
        trimmed = [answer.trim(sample) for sample in samples]
        scored, read = await self._score(
            {n: [*answer.tokens, *trimmed[n].token_ids] for n in self._find_readable(trimmed)}
        )
        best = max(scored, key=scored.__getitem__)
        self.blocks += 1
        self._generated += sum(len(sample.token_ids) for sample in samples)
        self._unreadable += len(samples) - len(scored)
        self._read += read
        self._reward = scored[best]
        self._interventions += best != 0
        shown = [
            {"text": sample.text, "tokens": len(sample.token_ids), "reward": scored.get(n)}
            for n, sample in enumerate(trimmed)
        ]
        self._trace.append({"chosen": best, "samples": shown})
        return trimmed[best]

    async def _score(self, texts: dict[int, list[int]]) -> tuple[dict[int, float], int]:
        """The rewards of texts, and the tokens read for them; those that cannot be scored are left out. Raises TooLong
        where none can."""
        try:
            return await self._score_together(texts)
        except UnscorableText as error:
            reason = error.reason
        scored: dict[int, float] = {}
        total = 0
        for n, text in texts.items():
            with suppress(UnscorableText):
                one, read = await self._score_together({n: text})
                scored |= one
                total += read
        if not scored:
            raise TooLong(self._search.length_field, f"none of the samples can be scored: {reason}; {SHORTER}")
        return scored, total

    async def _score_together(self, texts: dict[int, list[int]]) -> tuple[dict[int, float], int]:
        """The rewards of texts, and the tokens read for them; raises UnscorableText where one cannot be scored."""
        search = self._search
        rewards, read = await self._engine.score_answers(
            search.model, search.prompt, list(texts.values()), search.source
        )
        return dict(zip(texts, rewards, strict=True)), read

    def report(self, tokens: int) -> dict[str, Any]:
        """Of an answer of so many `tokens`, as other methods report; kl is the bound log n − (n − 1)/n of each choice
        among n samples."""
        n = self._search.guidance.n
        kl = self.blocks * (math.log(n) - (n - 1) / n)
        report = {
            "method": self._search.guidance.method,
            "tokens": tokens,
            "guided_tokens": tokens,
            "interventions": self._interventions,
            "kl": kl,
            "kl_truncation": 0.0,
            "kl_steering": kl,
            "rewards": {self._search.model.name: self._reward},
            "reward_model_tokens": self._read,
            "policy_tokens": 0,
            "saved_reward_model_tokens": 0,
            "saved_policy_tokens": 0,
            "sources": {BASE_SOURCE: tokens},
            "switches": 0,
            "generated_tokens": self._generated,
            "unreadable_samples": self._unreadable,
        }
        return {**report, "trace": self._trace} if self._search.guidance.trace else report

    def _find_readable(self, samples: Sequence[CompletionOutput]) -> list[int]:
        model = self._search.model
        if model.vocabulary is None:
            return list(range(len(samples)))
        unknown = [find_unreadable(sample.token_ids, model.vocabulary) for sample in samples]
        readable = [n for n, token in enumerate(unknown) if token is None]
        if not readable:
            raise UnreadableToken(
                "guidance.reward_model",
                f"{name_model(model)} reads the ids 0 to {model.vocabulary - 1}, and every sample holds another, such "
                f"as {unknown[0]}; keep the base to those with allowed_token_ids or logit_bias, or use a model with as "
                "large a vocabulary as the base's",
            )
        return readable
