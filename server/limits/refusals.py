"""Answers of the server's edge, before or instead of vLLM's: errors in the OpenAI shape."""

from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from steersman.server.metrics.requests import Refusal, count_refusal

Headers = dict[str, str]


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """The error object that vLLM's own routes answer with."""
    return {"error": {"message": message, "type": HTTPStatus(status).phrase, "param": param, "code": status}}


def refuse(
    status: int, message: str, reason: Refusal | None, *, param: str | None = None, headers: Headers | None = None
) -> JSONResponse:
    """An error response. reason: under which it is counted, if it is."""
    if reason is not None:
        count_refusal(reason)
    return JSONResponse(error_body(status, message, param), status_code=status, headers=headers)
