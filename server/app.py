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
from steersman.server.errors import fault_of, refuse_unreadable, reject
from steersman.server.limits.queue import Place, TooManyRequests
from steersman.server.limits.refusals import refuse
from steersman.server.metrics.exposition import router as metrics_router
from steersman.server.metrics.requests import FollowedRequest, follow
from steersman.server.placement import check_fields, check_outside_body
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

_GUIDED_PATHS = ("/v1/completions", "/v1/chat/completions")
_TOKEN_PATHS = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")
"""Take a preset's model like any other: tokens do not depend on guidance."""
_TAKEN = 'Write it as {"model": …, "guidance": {"method": …}}; see GET /v1/guidance.'

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}},
    400: {"model": ErrorResponse},
    404: {"model": ErrorResponse},
    500: {"model": ErrorResponse},
}


@router.get("/v1/models/{model:path}", responses={404: {"model": ErrorResponse}})
async def show_model(model: str, raw_request: Request) -> JSONResponse:
    """One model of `GET /v1/models`: the base, an adapter or a preset."""
    listed = await raw_request.app.state.openai_serving_models.show_available_models()
    if not model:
        return JSONResponse(listed.model_dump())
    for card in listed.data:
        if card.id == model:
            return JSONResponse(card.model_dump())
    known = ", ".join(card.id for card in listed.data)
    message = f"model: no model {model!r:.80} is served; GET /v1/models lists: {known}"
    return refuse(404, message, "model_not_loaded", param="model")


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
        return JSONResponse(await score_responses(engine, raw_request.app.state.openai_serving_chat, request))
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
    """Puts our routes in the place of vLLM's with the same path and method. The others refuse guidance, and all of them
    what stands in a wrong place."""
    routes = (*router.routes, *metrics_router.routes)
    ours = {(route.path, method) for route in routes if isinstance(route, APIRoute) for method in route.methods}
    app.router.routes[:] = [
        route
        for route in app.router.routes
        if not (isinstance(route, APIRoute) and any((route.path, method) in ours for method in route.methods))
        and not (isinstance(route, Mount) and (route.path, "GET") in ours)
    ]
    app.include_router(router)
    app.include_router(metrics_router)
    for route in app.router.routes:
        if isinstance(route, APIRoute) and "POST" in route.methods:
            check = get_parameterless_sub_dependant(depends=Depends(_check_fields), path=route.path_format)
            route.dependant.dependencies.insert(0, check)


def tidy_routes(app: FastAPI) -> None:
    """Takes away what no user should reach or this model cannot do; makes errors of what vLLM has none for."""
    closed = {"/scale_elastic_ep", "/is_scaling_elastic_ep"}
    if app.state.serving_structured_decisions is None:
        closed.add("/v1/systemone")
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in closed]
    app.exception_handlers[StarletteHTTPException] = app.exception_handlers[HTTPException]
    for error in (AttributeError, IndexError, KeyError):
        app.add_exception_handler(error, refuse_unreadable)


async def _check_fields(raw_request: Request) -> None:
    """vLLM passes over fields that it does not know, and an answer without guidance would look like one with it."""
    path, takes_guidance = raw_request.url.path, raw_request.scope["route"].path in _GUIDED_PATHS
    way_out = f"{path} takes no guidance; use {' or '.join(_GUIDED_PATHS)}"
    taken_here = _TAKEN if takes_guidance else f"{way_out}."
    try:
        check_outside_body(raw_request.query_params, raw_request.headers, taken_here)
        body = await _read_json(raw_request)
        if not isinstance(body, dict):
            return
        check_fields(body, taken_here)
        if takes_guidance:
            return
        if body.get("guidance") is not None:
            raise GuidanceError("guidance", way_out)
        stands_for = _engine(raw_request).registry.preset_of_model(body.get("model"))
        if stands_for is not None and path not in _TOKEN_PATHS:
            plain = body["model"].removesuffix(f":{stands_for}")
            raise GuidanceError("model", f"{body['model']!r} stands for guidance; {way_out}, or the model {plain!r}")
    except GuidanceError as error:
        reject(error)


async def _read_json(raw_request: Request) -> Any:
    try:
        return await raw_request.json()
    except ValueError:
        return None


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
    followed = follow(request.parsed_guidance.method)
    return await _answer_in_turn(place, followed, create, request, raw_request)


async def _answer_in_turn(
    place: Place,
    followed: FollowedRequest,
    create: Callable[..., Awaitable[Any]],
    request: _GuidedRequest,
    raw_request: Request,
) -> Any:
    """A stream waits for its turn behind its headers, and leaves the queue with its last event."""
    response = None
    try:
        await _measure_prompts(_engine(raw_request), request)
        await _measure_adapter(request, raw_request)
        if not request.stream:
            await place.turn()
        answer = await create(request, raw_request)
        if isinstance(answer, ErrorResponse):
            followed.answer_error(answer.error.code)
        if isinstance(answer, AsyncGenerator):
            response = _stream(answer, place, followed, request, raw_request)
            return response
        return _respond(answer, request, raw_request)
    except BaseException as error:
        if isinstance(error, Exception):
            fault = fault_of(error)
            followed.refuse() if fault is None else followed.fail(fault)
        # The client has gone, or one of several choices failed: nobody will ask for the others' reports.
        _drop_reports(_engine(raw_request), request.guidance_keys)
        raise
    finally:
        if response is None:
            place.leave()
            followed.end()


async def _measure_prompts(engine: GuidedEngine, request: _GuidedRequest) -> None:
    """What reward models that read text cannot read of a request is refused before it waits for its turn."""
    if not request.text_models:
        return
    try:
        request.keep_measured(
            [
                await engine.measure_prompt(request.text_models, tokens, source, request.prompt_field)
                for tokens, source in request.list_prompts()
            ]
        )
    except GuidanceError as error:
        reject(error)


async def _measure_adapter(request: _GuidedRequest, raw_request: Request) -> None:
    """A head that does not fit the adapter (LoRA) that a request names is refused likewise."""
    adapter = raw_request.app.state.openai_serving_models.lora_requests.get(request.model)
    if adapter is None or request.parsed_guidance is None:
        return
    try:
        await _engine(raw_request).measure_adapter(request.parsed_guidance, adapter)
    except GuidanceError as error:
        reject(error)


def _drop_reports(engine: GuidedEngine, keys: list[str]) -> None:
    for key in keys:
        engine.take_reports(key)


class _GuidedStream(StreamingResponse):
    """Leaves the queue when it has ended, however it ends: an iterator that was never begun has no end of its own."""

    def __init__(self, place: Place, followed: FollowedRequest, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._place, self._followed = place, followed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._place.leave()
            self._followed.end()


def _stream(
    events: AsyncGenerator[str, None],
    place: Place,
    followed: FollowedRequest,
    request: _GuidedRequest,
    raw_request: Request,
) -> _GuidedStream:
    described = _with_reports(events, place, followed, _engine(raw_request), request)
    return _GuidedStream(place, followed, with_sse_keep_alive(described, _keep_alive_s(raw_request)))


def _keep_alive_s(raw_request: Request) -> float:
    return float(getattr(raw_request.app.state.args, "sse_keep_alive_interval", 0))


def _respond(answer: Any, request: _GuidedRequest, raw_request: Request) -> Any:
    engine, keys = _engine(raw_request), request.guidance_keys
    if isinstance(answer, ErrorResponse):
        _drop_reports(engine, keys)
        return JSONResponse(answer.model_dump(), status_code=answer.error.code)
    if isinstance(answer, CompletionResponse | ChatCompletionResponse):
        body = answer.model_dump()
        _describe_choices(body, request, [engine.take_reports(key) for key in keys])
        return JSONResponse(body)
    events = with_sse_keep_alive(answer, _keep_alive_s(raw_request))
    return StreamingResponse(events, media_type="text/event-stream")


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
    events: AsyncGenerator[str, None],
    place: Place,
    followed: FollowedRequest,
    engine: GuidedEngine,
    request: _GuidedRequest,
) -> AsyncGenerator[str, None]:
    """Adds `guidance` to the chunk that carries a choice's finish_reason, and what else a whole body would say."""
    keys, n = request.guidance_keys, request.n or 1
    by_preset = engine.registry.preset_of_model(request.model) is not None
    try:
        await place.turn()
        async for event in events:
            if event.startswith('data: {"error"'):
                followed.answer_error(_status_of(event))
            last = '"finish_reason":"' in event or '"choices":[]' in event
            yield _describe_chunk(event, engine, request.model, keys, n) if last or by_preset else event
    finally:
        await events.aclose()
        _drop_reports(engine, keys)


def _status_of(event: str) -> int:
    """The code of an error event."""
    try:
        return int(json.loads(event.removeprefix("data: "))["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return 500


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
