"""`steersman serve`: vLLM's OpenAI server with guidance."""

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import uvloop

from steersman.guidance.checkpoints import ModelRefused, require_safetensors
from steersman.guidance.head_models import HEAD_KINDS
from steersman.guidance.request import BASE, Guidance, GuidanceError
from steersman.guidance.tokenizers import POLICY_KINDS
from steersman.server.config import CONFIG_KEY, WORKER_EXTENSION, ServerConfig, parse_named_paths, parse_templates
from steersman.server.cpu import ENGINE_FAILED, choose_cpu_settings
from steersman.server.limits.settings import Limits, add_limit_flags, read_limits
from steersman.server.logs import choose_json, hide, leave_out, tell
from steersman.server.memory import free_memory, require_cache_room
from steersman.server.metrics.directory import metrics_directory
from steersman.server.presets import check_names, load_presets

_SAFETENSORS = "safetensors"
"""How the base model is loaded unless --load-format asks for more: vLLM's own default reads pickles too."""
_DIED = "the engine has died; its last words are above"


def main(argv: Sequence[str]) -> int:
    """Serves until it is told to stop. Returns 2 for a start that was refused and 1 for one that failed, after one
    line that says why."""
    if wants_json(argv):
        choose_json()
    try:
        with metrics_directory():
            args = parse_arguments(argv)
            limits = read_limits(args)
            hide((*limits.api_keys, *limits.admin_keys))
            presets = check_before_start(args, limits)
            prepare_cpu(args)
            uvloop.run(serve(args, presets, limits))
    except ModelRefused as refusal:
        tell(f"steersman: {refusal}", failed=True)
        return 2
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        tell(f"steersman: the server stopped: {explain(reason)}", failed=True)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def prepare_cpu(args: argparse.Namespace) -> None:
    """Before the engine starts, on a CPU: settles what vLLM would take of the machine."""
    from steersman.server import vllm

    if vllm.runs_on_cpu():
        cache_given = args.kv_cache_memory_bytes is not None
        chosen = choose_cpu_settings(os.environ, free_memory(torch.device("cpu")), cache_given)
        if chosen is not None:
            tell(chosen)


def explain(reason: str) -> str:
    """Why the server stopped, with the way out where vLLM's reason names none."""
    from steersman.server import vllm

    return f"{reason} {ENGINE_FAILED}" if "Engine core init" in reason and vllm.runs_on_cpu() else reason


def wants_json(argv: Sequence[str]) -> bool:
    """Whether log lines are to be JSON: known before vLLM, which logs while it is imported, reads the flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--log-format")
    return parser.parse_known_args(list(argv))[0].log_format == "json"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """vLLM's own flags, with ours beside them and ours bound to the loopback address by default."""
    from steersman.server import vllm

    vllm.cli_env_setup()
    parser = vllm.FlexibleArgumentParser(prog="steersman serve", description="vLLM's OpenAI server with guidance.")
    vllm.make_arg_parser(parser)
    group = parser.add_argument_group("guidance")
    group.add_argument(
        "--reward-model",
        action="append",
        default=[],
        metavar="NAME=PATH_OR_REPO",
        help="A reward model that requests may name; give the flag once for each.",
    )
    group.add_argument(
        "--reward-template",
        action="append",
        default=[],
        metavar="NAME=raw|pair|FILE",
        help="How a reward model that is scored from text reads a conversation and the unfinished answer: one text, "
        "two segments, or a chat template (a Jinja file). By default its tokenizer's own chat template, and pair for "
        "an encoder without one, which then takes one user message only.",
    )
    group.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="NAME=PATH_OR_REPO",
        help="A policy that requests may name: a causal language model with the base's vocabulary, an adapter (LoRA) "
        "over the base, or a head on its hidden states; give the flag once for each.",
    )
    group.add_argument(
        "--guidance-presets",
        metavar="FILE",
        help="YAML file of presets, NAME: guidance object; each is served as the model MODEL:NAME.",
    )
    group.add_argument(
        "--guidance-cache",
        type=float,
        default=1.0,
        metavar="GIB",
        help="Memory for the key-value caches of all reward models and policies together. Default: 1.",
    )
    group.add_argument(
        "--admin-model-root",
        metavar="DIR",
        help="Folder whose checkpoints may be loaded while the server runs (POST /v1/admin/models/load).",
    )
    add_limit_flags(parser)
    parser.set_defaults(host="127.0.0.1", load_format=_SAFETENSORS)
    args = parser.parse_args(list(argv))
    if args.model_tag:
        args.model = args.model_tag
    if args.log_format == "json":
        args.use_tqdm_on_load = False
    vllm.configure_logging_from_args(args)
    vllm.validate_parsed_serve_args(args)
    return args


def check_before_start(args: argparse.Namespace, limits: Limits) -> dict[str, Guidance]:
    """Refuses in a second what would fail only after the base model is loaded, hands the rest to the workers, and
    returns the presets."""
    from steersman.guidance.policies import inspect_policy
    from steersman.guidance.reward_loading import inspect_reward_model
    from steersman.server import vllm
    from steersman.server.loading import load_tokenizer

    if not 0 < args.guidance_cache < math.inf:
        raise ModelRefused(f"--guidance-cache {args.guidance_cache:g}: give a positive number of GiB")
    if (args.api_server_count or 1) > 1:
        raise ModelRefused("--api-server-count: guidance is admitted by one API process; leave it at 1")
    if args.data_parallel_size > 1 and not (args.data_parallel_external_lb or args.data_parallel_rank is not None):
        # vLLM's client passes calls on to every engine, and back only what the first one replies.
        raise ModelRefused(
            "--data-parallel-size: the reports of all engines but the first would be lost; start a server for each and "
            "put a router in front (docs/operations.md)"
        )
    rewards, policies = (
        parse_named_paths("--reward-model", args.reward_model),
        parse_named_paths("--policy", args.policy),
    )
    if BASE in policies:
        raise ModelRefused(f"--policy {BASE}: this is the base model's own name among policies; choose another one")
    if both := sorted(set(rewards) & set(policies)):
        raise ModelRefused(f"--policy {both[0]}: a reward model has this name already; names must differ")
    if args.admin_model_root is not None and not os.path.isdir(args.admin_model_root):
        raise ModelRefused(f"--admin-model-root {args.admin_model_root}: this is not a folder")
    if args.admin_model_root is not None and not limits.admin_keys:
        raise ModelRefused("--admin-model-root: models are loaded by routes that need --admin-api-key KEY")
    presets = load_presets(args.guidance_presets, rewards, policies)
    adapters = [adapter.name for adapter in getattr(args, "lora_modules", None) or ()]
    check_names(presets, vllm.served_names(args), adapters)
    for name, preset in presets.items():
        try:
            limits.caps.check_guidance(preset)
        except GuidanceError as error:
            raise ModelRefused(f"--guidance-presets {args.guidance_presets}: {name}: {error}") from error
    templates = parse_templates(args.reward_template, rewards)
    config = ServerConfig(rewards, policies, args.guidance_cache, templates)
    if vllm.runs_on_cpu() and config.cached_models:
        # A GPU's memory is looked at by the worker: a look from here would take some of it.
        require_cache_room(args.guidance_cache, torch.device("cpu"))
    if args.load_format == _SAFETENSORS:
        require_safetensors(args.model, "base model")
    try:
        tokenizer = load_tokenizer(args.tokenizer or args.model, args.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelRefused(f"base model {args.model}: its tokenizer cannot be read: {reason}") from error
    for name, path in config.reward_models.items():
        inspect_reward_model(name, path, tokenizer, args.trust_remote_code, templates.get(name))
    for name, path in policies.items():
        inspect_policy(name, path, args.model, tokenizer, args.trust_remote_code)
    additional = args.additional_config or {}
    if isinstance(additional, str):
        additional = json.loads(additional)
    args.additional_config = {**additional, CONFIG_KEY: config.dump()}
    args.worker_extension_cls = WORKER_EXTENSION
    return presets


def describe_memory(model: Mapping[str, Any]) -> str:
    """What one auxiliary model takes of the memory that the server is given; vLLM's own cache gets what is left."""
    tokens = model["cache_blocks"] * model["block_size"]
    return (
        f"{'policy' if model['kind'] in POLICY_KINDS else 'reward model'} {model['name']!r}: "
        f"{model['weight_bytes'] / 2**20:.1f} MiB of weights, {model['cache_bytes'] / 2**20:.1f} MiB of cache for "
        f"{tokens} tokens of {model['bytes_per_token']} bytes"
    )


def describe_head(model: Mapping[str, Any]) -> str:
    """What a head takes, and how well it fits the base."""
    return (
        f"{'policy' if model['kind'] in POLICY_KINDS else 'reward model'} {model['name']!r}: a head of "
        f"{model['weight_bytes'] / 2**20:.1f} MiB, off by {model['drift']:.2g} of its spread on this base model"
    )


async def serve(args: argparse.Namespace, presets: dict[str, Guidance], limits: Limits) -> None:
    """Starts the engine, replaces the routes, and serves until shutdown. Raises ModelRefused for a model that cannot be
    served, and RuntimeError where the engine dies."""
    from steersman.server import vllm

    try:
        await _serve(args, presets, limits)
    except vllm.EngineDeadError:
        # As where it cannot run the base at all: proving a head is the first that is asked of it.
        raise RuntimeError(_DIED) from None


async def _serve(args: argparse.Namespace, presets: dict[str, Guidance], limits: Limits) -> None:
    from steersman.server import vllm
    from steersman.server.admin import attach_admin_routes
    from steersman.server.app import attach_routes, tidy_routes
    from steersman.server.engine import GuidedEngine
    from steersman.server.heads import prove_head
    from steersman.server.lifecycle import build_lifecycle
    from steersman.server.limits.attach import attach_limits
    from steersman.server.liveness import Workers
    from steersman.server.registry import build_registry

    _, sock = vllm.setup_server(args, reuse_port=False)
    try:
        async with vllm.build_engine(vllm.AsyncEngineArgs.from_cli_args(args)) as engine:
            workers = Workers(map(tuple, await engine.collective_rpc("steersman_prepare")))
            described = [reply for reply in await engine.collective_rpc("steersman_describe") if reply is not None]
            if described[0]["refusal"] is not None:
                raise ModelRefused(described[0]["refusal"])
            for model in (*described[0]["reward_models"], *described[0]["policies"]):
                if "cache_bytes" in model:
                    tell(describe_memory(model))
                if model["kind"] in HEAD_KINDS:
                    model |= await prove_head(engine, model["name"])
                    tell(describe_head(model))
            registry = build_registry(described[0], presets, vllm.served_names(args))
            tasks = await engine.get_supported_tasks()
            app = vllm.build_app(args, tasks, engine.model_config)
            attach_routes(app)
            guided = GuidedEngine(engine, registry, limits, workers)
            if limits.admin_keys:
                attach_admin_routes(app, build_lifecycle(guided, args))
            await vllm.init_app_state(guided, app.state, args, tasks)
            vllm.list_presets(app.state, presets)
            tidy_routes(app)
            guided.drain_by(attach_limits(app, limits).drain)
            leave_out((args.disable_access_log_for_endpoints or "").split(","))
            shutdown = await vllm.serve_app(app, sock, args)
            if engine.errored and not guided.stopping:
                raise RuntimeError(_DIED)
        await shutdown
    finally:
        sock.close()
