"""Log-probabilities of a given text under the guided distribution, token by token.

vLLM computes a prompt's log-probabilities in its prefill, where nothing is sampled and nothing guided. Here the text is
decoded instead, every token forced: the same steps, gates and models as for an answer, at the price of a step a token.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from steersman.guidance.plan import Plan
from steersman.guidance.request import GuidanceError, SearchGuidance
from steersman.server.config import CONFIG_KEY
from steersman.server.vllm import RequestOutput, RequestOutputKind, SamplingParams

ANSWER_START = "answer_start"
"""The request's field for how many of the text's tokens are the prompt that the rest answers."""
LOGPROBS_FIELD = "logprobs_field"
"""Where a request's entry holds the name of the field by which it asks for a text's log-probabilities."""


def choose_start(plan: Plan, entry: Mapping[str, Any], tokens: int) -> int:
    """From which token on a text of so many `tokens` is scored under guidance; what comes before is its prompt.

    entry: of the request that asks for the log-probabilities. Raises GuidanceError where the start makes a difference
    and the request does not tell.
    """
    answer_start = entry.get(ANSWER_START)
    if answer_start is not None:
        if answer_start >= tokens:
            raise GuidanceError(
                ANSWER_START, f"{answer_start} leaves nothing to score of a prompt of {tokens} tokens; give a lower one"
            )
        return answer_start
    counted = {"first_tokens or length": plan.gate.first_tokens, "kl_budget": plan.kl_budget}
    for name, value in counted.items():
        if value is not None:
            raise GuidanceError(
                entry[LOGPROBS_FIELD],
                f"log-probabilities of a text depend on where the answer begins, for {name} counts from there; give "
                f"{ANSWER_START}, the number of the prompt's tokens in front of it, or leave that part of the guidance "
                "out",
            )
    return 1


def refuse(guidance: SearchGuidance, params: SamplingParams, entry: Mapping[str, Any]) -> None:
    """Raises GuidanceError for a method that picks among samples where a text's log-probabilities are asked for."""
    if params.prompt_logprobs is not None:
        field = entry[LOGPROBS_FIELD]
        raise GuidanceError(
            field,
            f"{guidance.method} has no log-probabilities of a given text; use a method that guides every token, or "
            f"leave {field} out",
        )


def refuse_drafts(entry: Mapping[str, Any]) -> None:
    """Raises GuidanceError: under speculative decoding a step takes any number of a text's tokens."""
    raise GuidanceError(
        entry[LOGPROBS_FIELD],
        "log-probabilities of a text under guidance cannot be had under speculative decoding, which decodes several of "
        "its tokens at once; leave it out or start without --speculative-config",
    )


def check_mode(logprobs_mode: str, entry: Mapping[str, Any]) -> None:
    """Raises GuidanceError where the server was told to return log-probabilities of what is left to sample from: of a
    forced token that is always 0."""
    if logprobs_mode.startswith("processed"):
        raise GuidanceError(
            entry[LOGPROBS_FIELD],
            "log-probabilities of a text under guidance need a server without --logprobs-mode "
            f"{logprobs_mode}; start it with raw_logprobs",
        )


def check_source(entry: Mapping[str, Any]) -> None:
    """Raises GuidanceError for a conversation that a reward model reads as text: its form has none of the tokens of the
    base model's prompt."""
    if (entry.get("source") or {}).get("messages") is not None:
        raise GuidanceError(
            entry[LOGPROBS_FIELD],
            "log-probabilities of a conversation cannot be had under a reward model that reads text; send the text to "
            "/v1/completions",
        )


def force_text(
    entry: dict[str, Any], prompt: dict[str, Any], start: int, params: SamplingParams
) -> tuple[dict[str, Any], SamplingParams]:
    """The prompt and sampling parameters of the request that scores a text from token `start` on.

    entry, prompt and params: those of the request that asks for the log-probabilities.
    """
    tokens = list(prompt["prompt_token_ids"])
    # A reward model that reads text gets the tokens of the prompt decoded: the request's own prompt is all of the text.
    forced = {**entry, "source": None, "key": uuid4().hex, "forced": tokens[start:], "max_tokens_field": "prompt"}
    # What was measured is all of the text, of which the answer is a part.
    forced["measured"] = {name: length - len(tokens) + start for name, length in entry.get("measured", {}).items()}
    scored = SamplingParams(
        temperature=0.0,
        max_tokens=len(tokens) - start,
        ignore_eos=True,
        logprobs=params.prompt_logprobs,
        prompt_logprobs=params.prompt_logprobs,
        skip_special_tokens=params.skip_special_tokens,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={CONFIG_KEY: forced},
    )
    return {"type": "token", "prompt_token_ids": tokens[:start]}, scored


async def read_logprobs(outputs: AsyncGenerator[RequestOutput, None]) -> list[Any]:
    """The log-probabilities of a forced text from the outputs of its request, one entry a token as vLLM has them: None
    for the first token, the base model's for the rest of the prompt, the guided ones behind it."""
    async with aclosing(outputs):
        async for output in outputs:
            last = output
    return [*last.prompt_logprobs, *last.outputs[0].logprobs]


async def add_logprobs(
    outputs: AsyncGenerator[RequestOutput, None], logprobs: list[Any], *, once: bool
) -> AsyncGenerator[RequestOutput, None]:
    """`outputs` with the prompt's log-probabilities, in the first one only where they are streamed as deltas."""
    waiting: list[Any] | None = logprobs
    async with aclosing(outputs):
        async for output in outputs:
            if waiting is not None:
                output.prompt_logprobs = waiting
            yield output
            if once:
                waiting = None
