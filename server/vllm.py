"""Every import of vLLM's entry points: they move between releases, so they are named in this one place."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial
from itertools import product
from typing import Any

from fastapi import FastAPI
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import serve_http, setup_server
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import (
    cli_env_setup,
    load_aware_call,
    validate_json_request,
    with_cancellation,
)
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive
from vllm.exceptions import GenerationError, VLLMValidationError
from vllm.logger import configure_logging_from_args
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.outputs import LogprobsLists

from steersman.server.adapters import attach_adapter, require_exact_drafts
from steersman.server.limits import headers
from steersman.server.limits.headers import BoundedHeaders

__all__ = [
    "AsyncEngineArgs",
    "ChatCompletionRequest",
    "ChatCompletionResponse",
    "CompletionOutput",
    "CompletionRequest",
    "CompletionResponse",
    "EngineClient",
    "EngineCoreOutput",
    "EngineCoreRequest",
    "EngineDeadError",
    "ErrorInfo",
    "ErrorResponse",
    "FinishReason",
    "FlexibleArgumentParser",
    "GenerationError",
    "LoRARequest",
    "LogprobsLists",
    "OpenAIServingChat",
    "OutputProcessor",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "VLLMValidationError",
    "build_app",
    "build_engine",
    "cli_env_setup",
    "configure_logging_from_args",
    "create_error_response",
    "init_app_state",
    "list_presets",
    "load_aware_call",
    "make_arg_parser",
    "runs_on_cpu",
    "serve_app",
    "served_names",
    "setup_server",
    "validate_json_request",
    "validate_parsed_serve_args",
    "with_cancellation",
    "with_sse_keep_alive",
]

_LAST_CONNECTIONS_S = 5
"""Once nothing is answered any more, a client that does not read what was sent is not waited for."""


@asynccontextmanager
async def build_engine(engine_args: AsyncEngineArgs) -> AsyncIterator[AsyncLLM]:
    """vLLM's engine with the guidance processor that fits its model runner."""
    vllm_config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    attach_adapter(vllm_config)
    require_exact_drafts(vllm_config)
    engine = AsyncLLM.from_vllm_config(
        vllm_config=vllm_config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=engine_args.enable_log_requests,
        aggregate_engine_logging=engine_args.aggregate_engine_logging,
        disable_log_stats=engine_args.disable_log_stats,
    )
    try:
        await engine.reset_mm_cache()
        yield engine
    finally:
        engine.shutdown(timeout=vllm_config.shutdown_timeout)


def runs_on_cpu() -> bool:
    """Whether this is vLLM for a CPU."""
    return bool(current_platform.is_cpu())


def served_names(args: Any) -> list[str]:
    """Names under which the base model is served."""
    return list(args.served_model_name or [args.model])


def list_presets(state: Any, presets: Iterable[str]) -> None:
    """Makes every preset a model of its own, MODEL:PRESET, beside the base, under each of its names."""
    paths: list[BaseModelPath] = state.openai_serving_models.base_model_paths
    paths += [
        BaseModelPath(name=f"{base.name}:{preset}", model_path=base.model_path)
        for base, preset in product(tuple(paths), tuple(presets))
    ]


async def serve_app(app: FastAPI, sock: Any, args: Any) -> Any:
    """Serves an initialised app on a bound socket; returns vLLM's shutdown task."""
    log_config = get_uvicorn_log_config(args)
    return await serve_http(
        app,
        sock=sock,
        enable_ssl_refresh=args.enable_ssl_refresh,
        host=args.host,
        port=args.port,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers,
        http=partial(
            BoundedHeaders,
            max_bytes=args.h11_max_incomplete_event_size,
            timeout_s=min(args.request_timeout or headers.TIMEOUT_S, headers.TIMEOUT_S),
        ),
        timeout_graceful_shutdown=_LAST_CONNECTIONS_S,
        **({} if log_config is None else {"log_config": log_config}),
    )
