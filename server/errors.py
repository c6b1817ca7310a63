"""Errors in the OpenAI shape: what a client sees when guidance cannot be given."""

from typing import NoReturn

from steersman.guidance.request import GuidanceError
from steersman.server.metrics.requests import count_refusal, reason_of
from steersman.server.vllm import GenerationError, VLLMValidationError


class InvalidGuidance(VLLMValidationError):
    """HTTP 400. The message names the field already, so vLLM's suffix with parameter and value is left out."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}", parameter=field)
        self.text = f"{field}: {message}"

    def __str__(self) -> str:
        return self.text


class GuidanceFailed(GenerationError):
    """HTTP 500, or an error event in a stream: guidance failed while this one request was decoded."""


def reject(error: GuidanceError) -> NoReturn:
    """Counts a GuidanceError and raises it as HTTP 400."""
    count_refusal(reason_of(error))
    raise InvalidGuidance(error.field, str(error).removeprefix(f"{error.field}: ")) from None
