"""`POST /v1/rewards`: what a loaded reward model says of finished texts, and of every prefix of them."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from steersman.guidance.request import GuidanceError, ModelNotLoaded
from steersman.guidance.tokenizers import check_ids, find_unreadable
from steersman.server.engine import GuidedEngine
from steersman.server.limits.caps import MAX_RESPONSES
from steersman.server.registry import LoadedModel

Text = Annotated[str, StringConstraints(strict=True)]


class RewardsRequest(BaseModel):
    """Body of `POST /v1/rewards`."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="Name of a loaded reward model.")
    prompt: Text | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    responses: list[Text | list[int]] = Field(min_length=1, max_length=MAX_RESPONSES)
    prefixes: bool = Field(False, description="Score every prefix of each response too, token by token.")
    end_token: bool = Field(True, description="Responses given as text are finished: the end token is appended.")

    @model_validator(mode="after")
    def _one_prompt(self) -> "RewardsRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages, not both and not neither")
        return self


async def score_responses(engine: GuidedEngine, request: RewardsRequest) -> dict[str, Any]:
    """The response body: one object per response with its `reward`, and `prefix_rewards` when they were asked for."""
    model = engine.registry.reward_models.get(request.model)
    if model is None:
        known = ", ".join(sorted(engine.registry.reward_models)) or "none"
        raise ModelNotLoaded("model", f"no reward model {request.model!r:.80} is loaded; loaded are: {known}")
    engine.limits.caps.check_responses(len(request.responses))
    with engine.users.using([model]):
        return await _score_responses(engine, model, request)


async def _score_responses(engine: GuidedEngine, model: LoadedModel, request: RewardsRequest) -> dict[str, Any]:
    tokenizer, vocabulary = engine.renderer.tokenizer, engine.model_config.get_vocab_size()
    prompt = _prompt_tokens(tokenizer, request)
    _check_ids("messages" if request.prompt is None else "prompt", model, prompt, vocabulary)
    data = []
    for index, response in enumerate(request.responses):
        tokens = _response_tokens(tokenizer, response, request.end_token)
        _check_ids(f"responses.{index}", model, tokens, vocabulary)
        _check_length(f"responses.{index}", model, prompt, tokens)
        rewards = await engine.score(model, prompt, tokens)
        entry: dict[str, Any] = {"index": index, "reward": rewards[-1], "tokens": len(tokens)}
        if request.prefixes:
            entry["prefix_rewards"] = rewards
        data.append(entry)
    read = sum(entry["tokens"] for entry in data) + len(prompt) * len(data)
    return {"object": "list", "model": model.name, "data": data, "usage": {"total_tokens": read}}


def _prompt_tokens(tokenizer: Any, request: RewardsRequest) -> list[int]:
    if isinstance(request.prompt, list):
        return request.prompt
    if request.prompt is not None:
        return list(tokenizer.encode(request.prompt))
    try:
        text = tokenizer.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        raise GuidanceError("messages", f"do not fit the model's chat template: {error}") from error
    return list(tokenizer.encode(text, add_special_tokens=False))


def _response_tokens(tokenizer: Any, response: str | list[int], end_token: bool) -> list[int]:
    if isinstance(response, list):
        return response
    tokens = list(tokenizer.encode(response, add_special_tokens=False))
    return [*tokens, tokenizer.eos_token_id] if end_token and tokenizer.eos_token_id is not None else tokens


def _check_ids(field: str, model: LoadedModel, tokens: list[int], vocabulary: int) -> None:
    if find_unreadable(tokens, vocabulary) is not None:
        raise GuidanceError(field, f"holds a token outside of 0 to {vocabulary - 1}")
    check_ids([model], tokens, field)


def _check_length(field: str, model: LoadedModel, prompt: list[int], response: list[int]) -> None:
    if not response:
        raise GuidanceError(field, "is empty; a reward needs at least one token")
    total = len(prompt) + len(response)
    if total > model.window:
        raise GuidanceError(
            field, f"with the prompt has {total} tokens, reward model {model.name!r} reads at most {model.window}"
        )
