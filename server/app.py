"""Routes: vLLM's completions and chat completions with guidance, and `GET /v1/guidance`."""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.dependencies.utils import get_parameterless_sub_dependant
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute

from steersman.guidance.request import GuidanceError
from steersman.server.engine import GuidedEngine
from steersman.server.errors import reject
from steersman.server.protocol import GuidedChatCompletionRequest, GuidedCompletionRequest
from steersman.server.scoring import RewardsRequest, score_responses
from steersman.server.vllm import (
    ChatCompletionResponse,
    CompletionResponse,
    ErrorResponse,
    load_aware_call,
    validate_json_request,
    with_cancellation,
    with_sse_keep_alive,
)

router = APIRouter()

_GuidedRequest = GuidedCompletionRequest | GuidedChatCompletionRequest

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}},
    400: {"model": ErrorResponse},
    404: {"model": ErrorResponse},
    500: {"model": ErrorResponse},
}


@router.get("/v1/guidance")
async def show_guidance(raw_request: Request) -> dict[str, Any]:
    """What can be asked for: methods with their schemas, loaded models and the state of their caches, limits."""
    return await _engine(raw_request).describe()


@router.post("/v1/rewards", dependencies=[Depends(validate_json_request)], responses=_RESPONSES)
@with_cancellation
async def create_rewards(request: RewardsRequest, raw_request: Request) -> Any:
    """Rewards of finished texts."""
    try:
        return JSONResponse(await score_responses(_engine(raw_request), request))
    except GuidanceError as error:
        reject(error)


@router.post("/v1/completions", dependencies=[Depends(validate_json_request)], responses=_RESPONSES)
@with_cancellation
@load_aware_call
async def create_completion(request: GuidedCompletionRequest, raw_request: Request) -> Any:
    """OpenAI's completions with `guidance`."""
    return await _answer(raw_request.app.state.openai_serving_completion.create_completion, request, raw_request)


@router.post("/v1/chat/completions", dependencies=[Depends(validate_json_request)], responses=_RESPONSES)
@with_cancellation
@load_aware_call
async def create_chat_completion(request: GuidedChatCompletionRequest, raw_request: Request) -> Any:
    """OpenAI's chat completions with `guidance`."""
    return await _answer(raw_request.app.state.openai_serving_chat.create_chat_completion, request, raw_request)


def attach_routes(app: FastAPI) -> None:
    """Puts our routes in the place of vLLM's with the same path and method; the others refuse guidance."""
    ours = {(route.path, method) for route in router.routes if isinstance(route, APIRoute) for method in route.methods}
    app.router.routes[:] = [
        route
        for route in app.router.routes
        if not (isinstance(route, APIRoute) and any((route.path, method) in ours for method in route.methods))
    ]
    for route in app.router.routes:
        if isinstance(route, APIRoute) and "POST" in route.methods:
            refusal = get_parameterless_sub_dependant(depends=Depends(_refuse_guidance), path=route.path_format)
            route.dependant.dependencies.insert(0, refusal)
    app.include_router(router)


async def _refuse_guidance(raw_request: Request) -> None:
    """vLLM passes over fields that it does not know, and an answer without guidance would look like one with it."""
    if b'"guidance"' not in await raw_request.body():
        return
    try:
        body = await raw_request.json()
    except ValueError:
        return
    if isinstance(body, dict) and body.get("guidance") is not None:
        path = raw_request.url.path
        reject(GuidanceError("guidance", f"{path} does not know it; use /v1/completions or /v1/chat/completions"))


def _engine(raw_request: Request) -> GuidedEngine:
    return raw_request.app.state.engine_client


async def _answer(create: Callable[..., Awaitable[Any]], request: _GuidedRequest, raw_request: Request) -> Any:
    engine = _engine(raw_request)
    if request.parsed_guidance is not None:
        try:
            engine.registry.check(request.parsed_guidance)
        except GuidanceError as error:
            reject(error)
    try:
        answer = await create(request, raw_request)
    except BaseException:
        # The client has gone, or one of several choices failed: nobody will ask for the others' reports.
        _drop_reports(engine, request.guidance_keys)
        raise
    return _respond(answer, request, raw_request)


def _drop_reports(engine: GuidedEngine, keys: list[str]) -> None:
    for key in keys:
        engine.take_reports(key)


def _respond(answer: Any, request: _GuidedRequest, raw_request: Request) -> Any:
    engine, keys, n = _engine(raw_request), request.guidance_keys, request.n or 1
    if isinstance(answer, ErrorResponse):
        _drop_reports(engine, keys)
        return JSONResponse(answer.model_dump(), status_code=answer.error.code)
    if isinstance(answer, CompletionResponse | ChatCompletionResponse):
        body = answer.model_dump()
        if keys:
            reports = [engine.take_reports(key) for key in keys]
            for choice in body["choices"]:
                choice["guidance"] = reports[choice["index"] // n].get(choice["index"] % n)
        return JSONResponse(body)
    events = _with_reports(answer, engine, keys, n) if keys else answer
    interval = float(getattr(raw_request.app.state.args, "sse_keep_alive_interval", 0))
    return StreamingResponse(with_sse_keep_alive(events, interval), media_type="text/event-stream")


async def _with_reports(
    events: AsyncGenerator[str, None], engine: GuidedEngine, keys: list[str], n: int
) -> AsyncGenerator[str, None]:
    """Adds `guidance` to the chunk that carries a choice's finish_reason; other chunks pass as they are."""
    try:
        async for event in events:
            yield _add_report(event, engine, keys, n) if '"finish_reason":"' in event else event
    finally:
        await events.aclose()
        _drop_reports(engine, keys)


def _add_report(event: str, engine: GuidedEngine, keys: list[str], n: int) -> str:
    chunk = json.loads(event.removeprefix("data: "))
    for choice in _finished(chunk):
        choice["guidance"] = engine.peek_report(keys[choice["index"] // n], choice["index"] % n)
    return f"data: {json.dumps(chunk, separators=(',', ':'), ensure_ascii=False)}\n\n"


def _finished(chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (choice for choice in chunk.get("choices", ()) if choice.get("finish_reason"))
