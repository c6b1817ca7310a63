"""vLLM's request models with one more field, `guidance`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar
from uuid import uuid4

from pydantic import Field, PrivateAttr, model_validator

from steersman.guidance.request import Guidance, GuidanceError, parse_guidance
from steersman.guidance.text_form import Source
from steersman.server.config import CONFIG_KEY, GuidanceEntry
from steersman.server.errors import reject
from steersman.server.registry import LoadedModel, Registry
from steersman.server.sources import chat_source, completion_prompts, completion_source
from steersman.server.vllm import ChatCompletionRequest, CompletionRequest, SamplingParams


class _Guided:
    """Adds a request's guidance to its sampling parameters, under a key by which its reports are found again."""

    guidance: Any
    model: Any
    _guidance: Guidance | None
    _keys: list[str]
    _text_models: list[LoadedModel]
    _measured: list[dict[str, int]]
    _constraint: str | None
    prompt_field: ClassVar[str]
    """The field for what is answered."""

    @property
    def text_models(self) -> list[LoadedModel]:
        """The reward models that read text."""
        return self._text_models

    @property
    def parsed_guidance(self) -> Guidance | None:
        """The checked guidance, or None for a plain request."""
        return self._guidance

    @property
    def guidance_keys(self) -> list[str]:
        """One key for each prompt of the request, in order."""
        return self._keys

    def choose_guidance(self, registry: Registry) -> None:
        """Puts a preset, named by the model or by `guidance`, in its place, and checks that all models are loaded.

        Raises GuidanceError.
        """
        preset = registry.preset_of_model(getattr(self, "model", None))
        if preset is not None and self.guidance is not None:
            raise GuidanceError("guidance", f"model {self.model!r:.80} stands for a preset already; leave one out")
        if preset is None and isinstance(self.guidance, str):
            preset = self.guidance
        if preset is not None:
            self._check_compatible()
            self._guidance = registry.find_preset(preset)
        if self._guidance is not None:
            registry.check(self._guidance)
            self._text_models = registry.text_models(self._guidance)
            if self._text_models:
                source = self._source(0)
                for model in self._text_models:
                    model.check_source(source, "messages")

    def list_prompts(self) -> list[tuple[list[int], Source | None]]:
        """Each prompt for reward models that read text: what it is made of, or its token ids where it is these."""
        raise NotImplementedError

    def keep_measured(self, tokens: Sequence[Mapping[str, int]]) -> None:
        """tokens: of each prompt, as text models read it, by their names."""
        self._measured = list(map(dict, tokens))

    def _source(self, index: int) -> Source | None:
        """What prompt `index` is made of, for reward models that read text; None for token ids."""
        raise NotImplementedError

    def _check_guidance(self) -> None:
        # Tool parsers put structured_outputs in the place of what was sent.
        self._constraint = self._find_constraint()
        if self.guidance is None:
            return
        self._check_compatible()
        if isinstance(self.guidance, str):
            return
        try:
            self._guidance = parse_guidance(self.guidance)
        except GuidanceError as error:
            reject(error)

    def _check_compatible(self) -> None:
        if getattr(self, "use_beam_search", False):
            reject(GuidanceError("use_beam_search", "does not work with guidance; leave one of the two out"))
        if getattr(self, "prompt_embeds", None) is not None:
            reject(GuidanceError("prompt_embeds", "do not work with guidance, whose models read tokens; send a prompt"))

    def _find_constraint(self) -> str | None:
        """The field by which the request constrains its answer's form: the first one that was sent."""
        response_format = getattr(self, "response_format", None)
        constraints = {
            "structured_outputs": getattr(self, "structured_outputs", None) is not None,
            "response_format": response_format is not None and response_format.type != "text",
            "tool_choice": getattr(self, "tool_choice", None) not in (None, "none", "auto"),
            "tools": bool(getattr(self, "tools", None)),
        }
        return next((name for name, sent in constraints.items() if sent), None)

    def _attach_guidance(self, params: SamplingParams) -> SamplingParams:
        answer_start = getattr(self, "answer_start", None)
        if answer_start is not None and (self._guidance is None or params.prompt_logprobs is None):
            reject(GuidanceError("answer_start", "needs guidance, and prompt_logprobs or echo with logprobs"))
        if self._guidance is not None:
            self._keys.append(uuid4().hex)
            fields = ("max_completion_tokens", "max_tokens")
            index = len(self._keys) - 1
            source = self._source(index) if self._text_models else None
            entry = GuidanceEntry(
                key=self._keys[-1],
                guidance=self._guidance.model_dump(mode="json", exclude_unset=True),
                max_tokens_field=next((name for name in fields if getattr(self, name, None) is not None), None),
                answer_start=answer_start,
                constraint_field=self._constraint,
                prompt_field=self.prompt_field,
                logprobs_field="echo" if getattr(self, "prompt_logprobs", None) is None else "prompt_logprobs",
                measured=self._measured[index] if self._measured else {},
                **({} if source is None else {"source": asdict(source)}),
            )
            params.extra_args = {**(params.extra_args or {}), CONFIG_KEY: entry}
        return params


_FIELD: Any = Field(default=None, description="How this answer is steered; see GET /v1/guidance.")


class GuidedCompletionRequest(_Guided, CompletionRequest):
    """Body of `POST /v1/completions`."""

    prompt_field: ClassVar[str] = "prompt"
    guidance: Any = _FIELD
    answer_start: int | None = Field(
        default=None,
        ge=1,
        le=2**31 - 1,
        description="With guidance and prompt_logprobs, or echo and logprobs: how many of the prompt's tokens come "
        "before the answer whose log-probabilities under guidance are wanted. By default all but the first are scored.",
    )
    _guidance: Guidance | None = PrivateAttr(default=None)
    _keys: list[str] = PrivateAttr(default_factory=list)
    _text_models: list[LoadedModel] = PrivateAttr(default_factory=list)
    _measured: list[dict[str, int]] = PrivateAttr(default_factory=list)
    _constraint: str | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _guidance_is_valid(self) -> "GuidedCompletionRequest":
        self._check_guidance()
        return self

    def list_prompts(self) -> list[tuple[list[int], Source | None]]:
        """See _Guided.list_prompts."""
        return completion_prompts(self.prompt)

    def _source(self, index: int) -> Source | None:
        return completion_source(self.prompt, index)

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> SamplingParams:
        """vLLM's parameters with the guidance attached."""
        return self._attach_guidance(super().to_sampling_params(*args, **kwargs))


class GuidedChatCompletionRequest(_Guided, ChatCompletionRequest):
    """Body of `POST /v1/chat/completions`."""

    prompt_field: ClassVar[str] = "messages"
    guidance: Any = _FIELD
    _guidance: Guidance | None = PrivateAttr(default=None)
    _keys: list[str] = PrivateAttr(default_factory=list)
    _text_models: list[LoadedModel] = PrivateAttr(default_factory=list)
    _measured: list[dict[str, int]] = PrivateAttr(default_factory=list)
    _constraint: str | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _guidance_is_valid(self) -> "GuidedChatCompletionRequest":
        self._check_guidance()
        return self

    def list_prompts(self) -> list[tuple[list[int], Source | None]]:
        """See _Guided.list_prompts."""
        return [([], self._source(0))]

    def _source(self, index: int) -> Source | None:
        return chat_source(self.messages, self.continue_final_message)

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> SamplingParams:
        """vLLM's parameters with the guidance attached."""
        return self._attach_guidance(super().to_sampling_params(*args, **kwargs))
