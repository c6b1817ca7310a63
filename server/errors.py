"""Errors in the OpenAI shape: what a client sees when guidance cannot be given."""

from traceback import walk_tb
from typing import NoReturn

from starlette.requests import Request
from starlette.responses import Response

from steersman.guidance.request import GuidanceError
from steersman.server.limits.refusals import refuse
from steersman.server.metrics.requests import Fault, count_refusal, reason_of
from steersman.server.vllm import GenerationError, VLLMValidationError, create_error_response

_RESPONSE_ITEMS = "vllm.entrypoints.openai.responses.utils"


class InvalidGuidance(VLLMValidationError):
    """HTTP 400. The message names the field already, so vLLM's suffix with parameter and value is left out."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}", parameter=field)
        self.text = f"{field}: {message}"

    def __str__(self) -> str:
        return self.text


class GuidanceFailed(GenerationError):
    """HTTP 500, or an error event in a stream: guidance failed while this one request was decoded."""


def fault_of(error: Exception) -> Fault | None:
    """What an error that ends a guided request is counted as; None where the client is told 4xx."""
    if isinstance(error, GuidanceFailed):
        return "guidance"
    if isinstance(error, GuidanceError):
        return None
    return "engine" if create_error_response(error).error.code >= 500 else None


async def refuse_unreadable(request: Request, error: Exception) -> Response:
    """HTTP 400 where vLLM's `/v1/responses` trips over an item of the input whose parts are missing, which its types
    allow; any other error goes on its way."""
    if not any(frame.f_globals.get("__name__") == _RESPONSE_ITEMS for frame, _ in walk_tb(error.__traceback__)):
        raise error
    return refuse(400, f"input: an item lacks what belongs to it: {error}", "malformed", param="input")


def reject(error: GuidanceError) -> NoReturn:
    """Counts a GuidanceError and raises it as HTTP 400."""
    count_refusal(reason_of(error))
    raise InvalidGuidance(error.field, str(error).removeprefix(f"{error.field}: ")) from None
