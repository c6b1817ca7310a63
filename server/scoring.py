"""`POST /v1/rewards`: what a loaded reward model says of finished texts, and of every prefix of them."""

from dataclasses import asdict
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from steersman.guidance.head_models import HeadReward
from steersman.guidance.request import WHOLE, GuidanceError, ModelNotLoaded, TooLong
from steersman.guidance.text_form import Source
from steersman.guidance.tokenizers import check_ids, find_unreadable
from steersman.server.engine import GuidedEngine
from steersman.server.heads import run_together
from steersman.server.limits.caps import MAX_RESPONSES
from steersman.server.registry import EVERY_TOKEN, LoadedModel, PromptLength
from steersman.server.sources import chat_source, completion_source
from steersman.server.vllm import ChatCompletionRequest, ErrorResponse, OpenAIServingChat

Text = Annotated[str, StringConstraints(strict=True)]
TokenId = Annotated[int, Field(strict=True), WHOLE]


class RewardsRequest(BaseModel):
    """Body of `POST /v1/rewards`."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="Name of a loaded reward model.")
    prompt: Text | list[TokenId] | None = None
    messages: list[dict[str, Any]] | None = None
    responses: list[Text | list[TokenId]] = Field(min_length=1, max_length=MAX_RESPONSES)
    prefixes: bool = Field(False, description="Score every prefix of each response too, token by token.")
    end_token: bool = Field(
        True, description="Responses given as text are finished: the end token is appended where it is not there yet."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="As in chat completions.")

    @model_validator(mode="after")
    def _one_prompt(self) -> "RewardsRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages, not both and not neither")
        return self


async def score_responses(engine: GuidedEngine, chat: OpenAIServingChat, request: RewardsRequest) -> dict[str, Any]:
    """The response body: one object per response with its `reward`, and `prefix_rewards` when they were asked for."""
    model = engine.registry.reward_models.get(request.model)
    if model is None:
        known = ", ".join(sorted(engine.registry.reward_models)) or "none"
        raise ModelNotLoaded("model", f"no reward model {request.model!r:.80} is loaded; loaded are: {known}")
    engine.limits.caps.check_responses(len(request.responses))
    source = _find_source(model, request)
    prompt = await _prompt_tokens(engine, chat, request)
    with engine.users.using([model]):
        return await _score_responses(engine, model, request, prompt, source)


async def _score_responses(
    engine: GuidedEngine, model: LoadedModel, request: RewardsRequest, prompt: list[int], source: Source | None
) -> dict[str, Any]:
    vocabulary = engine.model_config.get_vocab_size()
    field = "messages" if request.prompt is None else "prompt"
    _check_ids(field, model, prompt, vocabulary)
    if not prompt and model.kind in EVERY_TOKEN:
        raise GuidanceError(
            field,
            f"is empty, and reward model {model.name!r} scores a token from what stands in front of it: give at least "
            "one token",
        )
    measured = await engine.measure_prompt([model], prompt, source, field) if model.kind == "text" else {}
    length = PromptLength(len(prompt), measured, field).for_model(model.name)
    sent = None if source is None else asdict(source)
    responses = [_response_tokens(engine.tokenizer, response, request.end_token) for response in request.responses]
    for index, tokens in enumerate(responses):
        _check_ids(f"responses.{index}", model, tokens, vocabulary)
        _check_length(f"responses.{index}", model, length, tokens)
    if model.kind == HeadReward.kind:
        # The base prefills them together; a model with a cache of its own reads one after the other.
        scored = await run_together(
            _score(engine, model, prompt, tokens, sent, request.prefixes) for tokens in responses
        )
    else:
        scored = [await _score(engine, model, prompt, tokens, sent, request.prefixes) for tokens in responses]
    data: list[dict[str, Any]] = [{"index": index, "tokens": len(tokens)} for index, tokens in enumerate(responses)]
    for entry, rewards in zip(data, scored, strict=True):
        if request.prefixes:
            entry["prefix_rewards"] = rewards
        entry["reward"] = rewards[-1]
    read = sum(entry["tokens"] for entry in data) + len(prompt) * len(data)
    return {"object": "list", "model": model.name, "data": data, "usage": {"total_tokens": read}}


async def _score(
    engine: GuidedEngine,
    model: LoadedModel,
    prompt: list[int],
    response: list[int],
    source: dict[str, Any] | None,
    prefixes: bool,
) -> list[float]:
    """The reward of each prefix of a response, or of the response alone."""
    if prefixes:
        return await engine.score_prefixes(model, prompt, response, source)
    rewards, _ = await engine.score_answers(model, prompt, [response], source)
    return rewards


def _find_source(model: LoadedModel, request: RewardsRequest) -> Source | None:
    if model.kind != "text":
        return None
    if request.messages is None:
        source = completion_source(request.prompt)
    else:
        try:
            source = chat_source(request.messages)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, GuidanceError):
                raise
            raise GuidanceError("messages", f"are not messages of a chat: {error}") from error
    model.check_source(source, "messages")
    return source


async def _prompt_tokens(engine: GuidedEngine, chat: OpenAIServingChat, request: RewardsRequest) -> list[int]:
    """A chat is rendered by vLLM itself, as for chat completions."""
    if isinstance(request.prompt, list):
        return request.prompt
    if request.prompt is not None:
        return list(engine.tokenizer.encode(request.prompt))
    try:
        asked = ChatCompletionRequest(messages=request.messages, chat_template_kwargs=request.chat_template_kwargs)
        rendered = await chat.online_renderer.render_chat(asked)
    except Exception as error:
        raise GuidanceError("messages", f"do not fit the model's chat template: {error}") from error
    if isinstance(rendered, ErrorResponse):
        raise GuidanceError("messages", f"do not fit the model's chat template: {rendered.error.message}")
    return list(rendered[1][0]["prompt_token_ids"])


def _response_tokens(tokenizer: Any, response: str | list[int], end_token: bool) -> list[int]:
    if isinstance(response, list):
        return response
    tokens = list(tokenizer.encode(response, add_special_tokens=False))
    end = tokenizer.eos_token_id
    return [*tokens, end] if end_token and end is not None and tokens[-1:] != [end] else tokens


def _check_ids(field: str, model: LoadedModel, tokens: list[int], vocabulary: int) -> None:
    if find_unreadable(tokens, vocabulary) is not None:
        raise GuidanceError(field, f"holds a token outside of 0 to {vocabulary - 1}")
    check_ids([model], tokens, field)


def _check_length(field: str, model: LoadedModel, prompt: int, response: list[int]) -> None:
    if not response:
        raise GuidanceError(field, "is empty; a reward needs at least one token")
    total = prompt + len(response)
    if total > model.window:
        raise TooLong(
            field, f"with the prompt has {total} tokens, reward model {model.name!r} reads at most {model.window}"
        )
