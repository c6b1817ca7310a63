"""`/v1/admin/models`: reward models and policies are listed, loaded and unloaded while the server answers requests."""

import asyncio
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from steersman.server.lifecycle import ChangeRefused, Kind, ModelLifecycle
from steersman.server.vllm import ErrorInfo, ErrorResponse, validate_json_request

router = APIRouter(prefix="/v1/admin/models")

Text = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=4096)]

_WAIT = "Answer when it is done; without it at once, with 202, and GET /v1/admin/models shows how far it is."
_RESPONSES: dict[int | str, dict[str, Any]] = {
    202: {"description": "It has begun."},
    **{status: {"model": ErrorResponse} for status in (400, 404, 409, 500)},
}


class LoadRequest(BaseModel):
    """Body of `POST /v1/admin/models/load`."""

    model_config = ConfigDict(extra="forbid")

    kind: Kind
    name: Text = Field(description="Under which requests will name it.")
    path: Text = Field(description="A checkpoint's folder, within --admin-model-root or relative to it.")
    cache_gib: float | None = Field(
        None,
        gt=0,
        le=2**20,
        allow_inf_nan=False,
        description="Memory for its key-value cache; by default as much as each model configured at start got.",
    )
    wait: bool = Field(True, description=_WAIT)


class UnloadRequest(BaseModel):
    """Body of `POST /v1/admin/models/unload`."""

    model_config = ConfigDict(extra="forbid")

    name: Text
    wait: bool = Field(True, description=_WAIT)


@router.get("")
async def list_models(raw_request: Request) -> dict[str, Any]:
    """Every reward model and policy with its state, the requests that use it and the presets that name it."""
    return _lifecycle(raw_request).describe()


@router.post("/load", dependencies=[Depends(validate_json_request)], responses=_RESPONSES)
async def load_model(request: LoadRequest, raw_request: Request) -> JSONResponse:
    """Loads a reward model or a policy beside the traffic; it goes on where the client does not wait."""
    lifecycle = _lifecycle(raw_request)
    try:
        task = lifecycle.begin_load(request.kind, request.name, request.path, request.cache_gib)
        if not request.wait:
            return JSONResponse({"name": request.name, "state": "loading"}, HTTPStatus.ACCEPTED)
        entry = await asyncio.shield(task)
    except ChangeRefused as refusal:
        return _refuse(refusal)
    if entry.error is not None:
        return _refuse(ChangeRefused(HTTPStatus.BAD_REQUEST, "path", entry.error))
    return JSONResponse(lifecycle.describe_entry(entry))


@router.post("/unload", dependencies=[Depends(validate_json_request)], responses=_RESPONSES)
async def unload_model(request: UnloadRequest, raw_request: Request) -> JSONResponse:
    """Refuses new requests for a model, waits for those that use it, and gives its memory back."""
    try:
        task = _lifecycle(raw_request).begin_unload(request.name)
        if not request.wait:
            return JSONResponse({"name": request.name, "state": "unloading"}, HTTPStatus.ACCEPTED)
        await asyncio.shield(task)
    except ChangeRefused as refusal:
        return _refuse(refusal)
    return JSONResponse({"name": request.name, "state": "unloaded"})


def attach_admin_routes(app: FastAPI, lifecycle: ModelLifecycle) -> None:
    """Adds the routes; whoever reaches them is trusted."""
    app.state.model_lifecycle = lifecycle
    app.include_router(router)


def _lifecycle(raw_request: Request) -> ModelLifecycle:
    return raw_request.app.state.model_lifecycle


def _refuse(refusal: ChangeRefused) -> JSONResponse:
    kind = {HTTPStatus.NOT_FOUND: "NotFoundError", HTTPStatus.CONFLICT: "ConflictError"}
    error = ErrorInfo(
        message=str(refusal),
        type=kind.get(refusal.status, "BadRequestError"),
        param=refusal.field,
        code=refusal.status.value,
    )
    return JSONResponse(ErrorResponse(error=error).model_dump(), refusal.status)
