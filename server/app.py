"""Routes: vLLM's completions and chat completions with guidance, and `GET /v1/guidance`."""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.dependencies.utils import get_parameterless_sub_dependant
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from steersman.guidance.request import GuidanceError
from steersman.server.engine import GuidedEngine
from steersman.server.errors import refuse_unreadable, reject
from steersman.server.limits.queue import Place, TooManyRequests
from steersman.server.metrics.exposition import router as metrics_router
from steersman.server.presets import preset_of_model
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
    engine = _engine(raw_request)
    try:
        place = engine.queue.enter()
    except TooManyRequests as full:
        return full.response()
    try:
        await place.turn()
        return JSONResponse(await score_responses(engine, request))
    except GuidanceError as error:
        reject(error)
    finally:
        place.leave()


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
    routes = (*router.routes, *metrics_router.routes)
    ours = {(route.path, method) for route in routes if isinstance(route, APIRoute) for method in route.methods}
    app.router.routes[:] = [
        route
        for route in app.router.routes
        if not (isinstance(route, APIRoute) and any((route.path, method) in ours for method in route.methods))
        and not (isinstance(route, Mount) and (route.path, "GET") in ours)
    ]
    for route in app.router.routes:
        if isinstance(route, APIRoute) and "POST" in route.methods:
            refusal = get_parameterless_sub_dependant(depends=Depends(_refuse_guidance), path=route.path_format)
            route.dependant.dependencies.insert(0, refusal)
    app.include_router(router)
    app.include_router(metrics_router)


def tidy_routes(app: FastAPI) -> None:
    """Takes away what no user should reach or this model cannot do; makes errors of what vLLM has none for."""
    closed = {"/scale_elastic_ep", "/is_scaling_elastic_ep"}
    if app.state.serving_structured_decisions is None:
        closed.add("/v1/systemone")
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in closed]
    app.exception_handlers[StarletteHTTPException] = app.exception_handlers[HTTPException]
    for error in (AttributeError, IndexError, KeyError):
        app.add_exception_handler(error, refuse_unreadable)


async def _refuse_guidance(raw_request: Request) -> None:
    """vLLM passes over fields that it does not know, and an answer without guidance would look like one with it."""
    content = await raw_request.body()
    presets = _engine(raw_request).registry.presets
    if b'"guidance"' not in content and not presets:
        return
    try:
        body = await raw_request.json()
    except ValueError:
        return
    if not isinstance(body, dict):
        return
    way_out = f"{raw_request.url.path} does not know it; use /v1/completions or /v1/chat/completions"
    if body.get("guidance") is not None:
        reject(GuidanceError("guidance", way_out))
    if preset_of_model(body.get("model"), presets) is not None:
        reject(GuidanceError("model", f"{body['model']!r} stands for guidance, and {way_out}"))


def _engine(raw_request: Request) -> GuidedEngine:
    return raw_request.app.state.engine_client


async def _answer(create: Callable[..., Awaitable[Any]], request: _GuidedRequest, raw_request: Request) -> Any:
    engine = _engine(raw_request)
    try:
        request.choose_guidance(engine.registry)
        engine.limits.caps.check_choices(request.n)
        if request.parsed_guidance is None:
            return _respond(await create(request, raw_request), request, raw_request)
        engine.limits.caps.check_guidance(request.parsed_guidance)
    except GuidanceError as error:
        reject(error)
    try:
        place = engine.queue.enter()
    except TooManyRequests as full:
        return full.response()
    return await _answer_in_turn(place, create, request, raw_request)


async def _answer_in_turn(
    place: Place, create: Callable[..., Awaitable[Any]], request: _GuidedRequest, raw_request: Request
) -> Any:
    """A stream waits for its turn behind its headers, and leaves the queue with its last event."""
    response = None
    try:
        if not request.stream:
            await place.turn()
        response = _respond(await create(request, raw_request), request, raw_request, place)
        return response
    except BaseException:
        # The client has gone, or one of several choices failed: nobody will ask for the others' reports.
        _drop_reports(_engine(raw_request), request.guidance_keys)
        raise
    finally:
        if not isinstance(response, _GuidedStream):
            place.leave()


def _drop_reports(engine: GuidedEngine, keys: list[str]) -> None:
    for key in keys:
        engine.take_reports(key)


class _GuidedStream(StreamingResponse):
    """Leaves the queue when it has ended, however it ends: an iterator that was never begun has no end of its own."""

    def __init__(self, place: Place, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._place.leave()


def _respond(answer: Any, request: _GuidedRequest, raw_request: Request, place: Place | None = None) -> Any:
    engine, keys = _engine(raw_request), request.guidance_keys
    if isinstance(answer, ErrorResponse):
        _drop_reports(engine, keys)
        return JSONResponse(answer.model_dump(), status_code=answer.error.code)
    if isinstance(answer, CompletionResponse | ChatCompletionResponse):
        body = answer.model_dump()
        _describe_choices(body, request, [engine.take_reports(key) for key in keys])
        return JSONResponse(body)
    interval = float(getattr(raw_request.app.state.args, "sse_keep_alive_interval", 0))
    if place is None:
        return StreamingResponse(with_sse_keep_alive(answer, interval), media_type="text/event-stream")
    return _GuidedStream(place, with_sse_keep_alive(_with_reports(answer, place, engine, request), interval))


def _describe_choices(body: dict[str, Any], request: _GuidedRequest, reports: list[dict[int, dict[str, Any]]]) -> None:
    """Adds each choice's report, the tokens of samples that were not chosen, and the model that was asked for."""
    if not reports:
        return
    n = request.n or 1
    for choice in body["choices"]:
        choice["guidance"] = reports[choice["index"] // n].get(choice["index"] % n)
    _add_discarded(body, reports)
    if request.model is not None:
        body["model"] = request.model


def _add_discarded(body: dict[str, Any], reports: list[dict[int, dict[str, Any]]]) -> None:
    """Samples that a search threw away were generated too: the client pays for them, and usage says so."""
    all_reports = [report for by_choice in reports for report in by_choice.values()]
    discarded = sum(r["generated_tokens"] - r["tokens"] for r in all_reports if "generated_tokens" in r)
    if discarded and body.get("usage"):
        body["usage"]["completion_tokens"] += discarded
        body["usage"]["total_tokens"] += discarded


async def _with_reports(
    events: AsyncGenerator[str, None], place: Place, engine: GuidedEngine, request: _GuidedRequest
) -> AsyncGenerator[str, None]:
    """Adds `guidance` to the chunk that carries a choice's finish_reason, and what else a whole body would say."""
    keys, n = request.guidance_keys, request.n or 1
    by_preset = preset_of_model(request.model, engine.registry.presets) is not None
    try:
        await place.turn()
        async for event in events:
            last = '"finish_reason":"' in event or '"choices":[]' in event
            yield _describe_chunk(event, engine, request.model, keys, n) if last or by_preset else event
    finally:
        await events.aclose()
        _drop_reports(engine, keys)


def _describe_chunk(event: str, engine: GuidedEngine, model: str | None, keys: list[str], n: int) -> str:
    try:
        chunk = json.loads(event.removeprefix("data: "))
    except ValueError:
        return event
    for choice in _finished(chunk):
        choice["guidance"] = engine.peek_report(keys[choice["index"] // n], choice["index"] % n)
    if not chunk.get("choices"):
        _add_discarded(chunk, [engine.peek_reports(key) for key in keys])
    if model is not None and "model" in chunk:
        chunk["model"] = model
    return f"data: {json.dumps(chunk, separators=(',', ':'), ensure_ascii=False)}\n\n"


def _finished(chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (choice for choice in chunk.get("choices", ()) if choice.get("finish_reason"))
