"""Builds a worker's runtime from vLLM's configuration: the same for both of vLLM's interfaces."""

from collections.abc import Mapping
from typing import Any

import torch
from rich.progress import track
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from steersman.guidance.auxiliary import ModelRefused
from steersman.guidance.plan import Plan, compile_plan
from steersman.guidance.request import parse_guidance
from steersman.guidance.rewards import RewardModel, load_reward_model
from steersman.guidance.runtime import GuidanceRuntime
from steersman.server.config import CONFIG_KEY, load_config


class WorkerRuntime(GuidanceRuntime):
    """A runtime that remembers why a model could not be loaded, so that the server can say it in one line."""

    refusal: str | None = None


def build_runtime(vllm_config: Any, device: torch.device) -> WorkerRuntime:
    """Loads every configured reward model beside the base model, in the base's precision."""
    config = load_config(vllm_config.additional_config)
    model_config = vllm_config.model_config
    tokenizer = load_tokenizer(model_config.tokenizer, model_config.trust_remote_code)
    models: dict[str, RewardModel] = {}
    refusal = None
    for name, path in track(config.reward_models.items(), "reward models", disable=not config.reward_models):
        try:
            models[name] = load_reward_model(
                name,
                path,
                tokenizer,
                dtype=model_config.dtype,
                device=device,
                cache_bytes=config.cache_bytes_per_model,
                max_rows=vllm_config.scheduler_config.max_num_seqs,
                trust_remote_code=model_config.trust_remote_code,
            )
        except ModelRefused as error:
            refusal = str(error)
            break
    runtime = WorkerRuntime(models, tokenizer.eos_token_id)
    runtime.refusal = refusal
    return runtime


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The base model's tokenizer."""
    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def read_plan(sampling_params: Any) -> tuple[tuple[str, int | None], Plan] | None:
    """The key and plan that the API process put into a request's sampling parameters, or None if it is plain.

    Choices of one request (n > 1) share everything but their seed, so the seed completes the key.
    """
    entry: Mapping[str, Any] | None = (sampling_params.extra_args or {}).get(CONFIG_KEY)
    if not isinstance(entry, Mapping):
        return None
    return (entry["key"], sampling_params.seed), compile_plan(parse_guidance(entry["guidance"]))
