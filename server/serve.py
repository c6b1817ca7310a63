"""`steersman serve`: vLLM's OpenAI server with guidance."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import uvloop

from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.request import BASE, Guidance
from steersman.server.config import CONFIG_KEY, ServerConfig, parse_named_paths
from steersman.server.metrics.directory import metrics_directory
from steersman.server.presets import load_presets


def main(argv: Sequence[str]) -> int:
    """Serves until it is told to stop. Returns 2 for a start that was refused and 1 for one that failed, after one
    line that says why."""
    try:
        with metrics_directory():
            args = parse_arguments(argv)
            presets = check_before_start(args)
            uvloop.run(serve(args, presets))
    except ModelRefused as refusal:
        print(f"steersman: {refusal}", file=sys.stderr)
        return 2
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        print(f"steersman: the server stopped: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


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
        "--policy",
        action="append",
        default=[],
        metavar="NAME=PATH_OR_REPO",
        help="A policy that requests may name: a causal language model with the base's vocabulary, or an adapter "
        "(LoRA) over the base; give the flag once for each.",
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
    parser.set_defaults(host="127.0.0.1")
    args = parser.parse_args(list(argv))
    if args.model_tag:
        args.model = args.model_tag
    vllm.configure_logging_from_args(args)
    vllm.validate_parsed_serve_args(args)
    return args


def check_before_start(args: argparse.Namespace) -> dict[str, Guidance]:
    """Refuses in a second what would fail only after the base model is loaded, hands the rest to the workers, and
    returns the presets."""
    from steersman.guidance.policies import inspect_policy
    from steersman.guidance.reward_loading import inspect_checkpoint
    from steersman.server.loading import load_tokenizer

    if args.guidance_cache <= 0:
        raise ModelRefused(f"--guidance-cache {args.guidance_cache}: give a positive number of GiB")
    if (args.api_server_count or 1) > 1:
        raise ModelRefused("--api-server-count: guidance is admitted by one API process; leave it at 1")
    if args.data_parallel_size > 1 and not (args.data_parallel_external_lb or args.data_parallel_rank is not None):
        # vLLM's client passes calls on to every engine, and back only what the first one replies.
        raise ModelRefused(
            "--data-parallel-size: the reports of all engines but the first would be lost; start a server for each and "
            "put a router in front (docs/operations.md)"
        )
    if args.speculative_config is not None:
        raise ModelRefused("--speculative-config: guidance does not work with speculative decoding; leave it out")
    rewards, policies = (
        parse_named_paths("--reward-model", args.reward_model),
        parse_named_paths("--policy", args.policy),
    )
    if BASE in policies:
        raise ModelRefused(f"--policy {BASE}: this is the base model's own name among policies; choose another one")
    if both := sorted(set(rewards) & set(policies)):
        raise ModelRefused(f"--policy {both[0]}: a reward model has this name already; names must differ")
    presets = load_presets(args.guidance_presets, rewards, policies)
    config = ServerConfig(rewards, policies, args.guidance_cache)
    try:
        tokenizer = load_tokenizer(args.tokenizer or args.model, args.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelRefused(f"base model {args.model}: its tokenizer cannot be read: {reason}") from error
    for name, path in config.reward_models.items():
        inspect_checkpoint(name, path, tokenizer, args.trust_remote_code)
    for name, path in policies.items():
        inspect_policy(name, path, tokenizer, args.trust_remote_code)
    additional = args.additional_config or {}
    if isinstance(additional, str):
        additional = json.loads(additional)
    args.additional_config = {**additional, CONFIG_KEY: config.dump()}
    args.worker_extension_cls = "steersman.server.worker.GuidanceWorkerExtension"
    return presets


def describe_memory(model: Mapping[str, Any]) -> str:
    """What one auxiliary model takes of the memory that the server is given; vLLM's own cache gets what is left."""
    tokens = model["cache_blocks"] * model["block_size"]
    return (
        f"{'policy' if model['kind'] == 'policy' else 'reward model'} {model['name']!r}: "
        f"{model['weight_bytes'] / 2**20:.1f} MiB of weights, {model['cache_bytes'] / 2**20:.1f} MiB of cache for "
        f"{tokens} tokens of {model['bytes_per_token']} bytes"
    )


async def serve(args: argparse.Namespace, presets: dict[str, Guidance]) -> None:
    """Starts the engine, replaces the routes, and serves until shutdown."""
    from steersman.server import vllm
    from steersman.server.app import attach_routes
    from steersman.server.engine import GuidedEngine
    from steersman.server.registry import build_registry

    _, sock = vllm.setup_server(args, reuse_port=False)
    try:
        async with vllm.build_engine(vllm.AsyncEngineArgs.from_cli_args(args)) as engine:
            await engine.collective_rpc("steersman_prepare")
            described = [reply for reply in await engine.collective_rpc("steersman_describe") if reply is not None]
            if described[0]["refusal"] is not None:
                raise ModelRefused(described[0]["refusal"])
            for model in (*described[0]["reward_models"], *described[0]["policies"]):
                if "cache_bytes" in model:
                    print(describe_memory(model))
            registry = build_registry(described[0], presets)
            tasks = await engine.get_supported_tasks()
            app = vllm.build_app(args, tasks, engine.model_config)
            attach_routes(app)
            await vllm.init_app_state(GuidedEngine(engine, registry), app.state, args, tasks)
            vllm.list_presets(app.state, presets)
            shutdown = await vllm.serve_app(app, sock, args)
        await shutdown
    finally:
        sock.close()
