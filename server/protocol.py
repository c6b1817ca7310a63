"""vLLM's request models with one more field, `guidance`."""

from typing import Any
from uuid import uuid4

from pydantic import Field, PrivateAttr, model_validator

from steersman.guidance.request import Guidance, GuidanceError, parse_guidance
from steersman.server.config import CONFIG_KEY
from steersman.server.errors import reject
from steersman.server.presets import preset_of_model
from steersman.server.registry import Registry
from steersman.server.vllm import ChatCompletionRequest, CompletionRequest, SamplingParams


class _Guided:
    """Adds a request's guidance to its sampling parameters, under a key by which its reports are found again."""

    guidance: Any
    model: Any
    _guidance: Guidance | None
    _keys: list[str]

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
        preset = preset_of_model(getattr(self, "model", None), registry.presets)
        if preset is not None and self.guidance is not None:
            raise GuidanceError("guidance", f"model {self.model!r:.80} stands for a preset already; leave one out")
        if preset is None and isinstance(self.guidance, str):
            preset = self.guidance
        if preset is not None:
            self._check_compatible()
            self._guidance = registry.find_preset(preset)
        if self._guidance is not None:
            registry.check(self._guidance)

    def _check_guidance(self) -> None:
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

    def _attach_guidance(self, params: SamplingParams) -> SamplingParams:
        extra = {key: value for key, value in (params.extra_args or {}).items() if key != CONFIG_KEY}
        if self._guidance is not None:
            self._keys.append(uuid4().hex)
            fields = ("max_completion_tokens", "max_tokens")
            extra[CONFIG_KEY] = {
                "key": self._keys[-1],
                "guidance": self._guidance.model_dump(mode="json", exclude_unset=True),
                "max_tokens_field": next((name for name in fields if getattr(self, name, None) is not None), None),
            }
        params.extra_args = extra or None
        return params


_FIELD: Any = Field(default=None, description="How this answer is steered; see GET /v1/guidance.")


class GuidedCompletionRequest(_Guided, CompletionRequest):
    """Body of `POST /v1/completions`."""

    guidance: Any = _FIELD
    _guidance: Guidance | None = PrivateAttr(default=None)
    _keys: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="after")
    def _guidance_is_valid(self) -> "GuidedCompletionRequest":
        self._check_guidance()
        return self

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> SamplingParams:
        """vLLM's parameters with the guidance attached."""
        return self._attach_guidance(super().to_sampling_params(*args, **kwargs))


class GuidedChatCompletionRequest(_Guided, ChatCompletionRequest):
    """Body of `POST /v1/chat/completions`."""

    guidance: Any = _FIELD
    _guidance: Guidance | None = PrivateAttr(default=None)
    _keys: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="after")
    def _guidance_is_valid(self) -> "GuidedChatCompletionRequest":
        self._check_guidance()
        return self

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> SamplingParams:
        """vLLM's parameters with the guidance attached."""
        return self._attach_guidance(super().to_sampling_params(*args, **kwargs))
