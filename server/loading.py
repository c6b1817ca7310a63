"""Builds a worker's runtime from vLLM's configuration: the same for both of vLLM's interfaces."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from vllm import envs

from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.head_models import ServedBase
from steersman.guidance.hidden_states import Span
from steersman.guidance.overlap import make_side_stream
from steersman.guidance.plan import Plan, compile_plan
from steersman.guidance.policies import load_policy
from steersman.guidance.request import BestOfN, Blockwise, parse_guidance
from steersman.guidance.reward_loading import load_reward_model
from steersman.guidance.runtime import GuidanceRuntime
from steersman.guidance.text_form import Source
from steersman.guidance.text_reward import TextReward
from steersman.server.compilation import compile_sampling_kernels
from steersman.server.config import CONFIG_KEY, load_config
from steersman.server.memory import require_cache_room
from steersman.server.metrics.worker import WorkerMetrics
from steersman.server.watchdog import Watchdog


@dataclass(frozen=True)
class Destination:
    """Where a worker's auxiliary models go."""

    tokenizer: PreTrainedTokenizerBase
    """The base model's."""
    dtype: torch.dtype
    device: torch.device
    cache_bytes: int
    """Of each model."""
    max_rows: int
    vocabulary: int
    """Of the base model's logits."""
    base: ServedBase


class WorkerRuntime(GuidanceRuntime):
    """A runtime that counts for Prometheus, ends its process where a model never returns, and remembers why a model
    could not be loaded, so that the server can say it in one line."""

    refusal: str | None = None
    destination: Destination
    """Of models that are loaded later."""
    metrics: WorkerMetrics | None = None
    """None on a rank that repeats what another one does, which would be counted twice."""
    watchdog: Watchdog | None = None

    def measure(self, name: str, prompt: Sequence[int], source: Source | None) -> int:
        """Tokens of a prompt in the form that text model `name` reads; raises TextUnreadable where it has none."""
        model = self.reward_models[name]
        assert isinstance(model, TextReward)
        with self.turn():
            return model.measure(prompt, source)

    def turn(self) -> AbstractContextManager[None]:
        """Watched: a model that never returns ends the process."""
        return nullcontext() if self.watchdog is None else self.watchdog.turn()

    def measured_step(self) -> AbstractContextManager[None]:
        """Counted for Prometheus."""
        return nullcontext() if self.metrics is None else self.metrics.step()

    def show_metrics(self) -> None:
        """After anything else that reads tokens or gives blocks back."""
        if self.metrics is not None:
            self.metrics.show()


def build_runtime(vllm_config: Any, device: torch.device) -> WorkerRuntime:
    """Loads every configured reward model and policy beside the base model, in the base's precision."""
    config = load_config(vllm_config.additional_config)
    model_config = vllm_config.model_config
    tokenizer = load_tokenizer(model_config.tokenizer, model_config.trust_remote_code)
    rows = vllm_config.scheduler_config.max_num_seqs
    destination = Destination(
        *(tokenizer, model_config.dtype, device, config.cache_bytes_per_model, rows, model_config.get_vocab_size()),
        base=describe_base(model_config),
    )
    options: dict[str, Any] = {
        **{name: getattr(destination, name) for name in ("dtype", "device", "cache_bytes", "max_rows")},
        "trust_remote_code": model_config.trust_remote_code,
    }
    side = make_side_stream(device)
    try:
        if config.cached_models:
            require_cache_room(config.cache_gib, device)
        rewards = _load(
            "reward models",
            config.reward_models,
            lambda n, path: load_reward_model(
                n, path, tokenizer, **options, template=config.reward_templates.get(n), served=destination.base
            ),
        )
        policies = _load(
            "policies",
            config.policies,
            lambda n, path: load_policy(n, path, model_config.model, tokenizer, **options, served=destination.base),
        )
    except ModelRefused as error:
        runtime = WorkerRuntime({}, tokenizer.eos_token_id)
        runtime.refusal = str(error)
        return runtime
    if rewards or policies:
        compile_sampling_kernels(destination.vocabulary, device)
    runtime = WorkerRuntime(rewards, tokenizer.eos_token_id, policies, side)
    parallel = vllm_config.parallel_config
    if parallel.rank % parallel.tensor_parallel_size == 0 or parallel.enable_batch_sharded_sampling:
        runtime.metrics = WorkerMetrics(runtime)
    runtime.destination = destination
    runtime.watchdog = Watchdog(envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)
    return runtime


def _load(what: str, paths: Mapping[str, str], load: Callable[[str, str], Any]) -> dict[str, Any]:
    silent = not paths or not sys.stdout.isatty()
    return {name: load(name, path) for name, path in track(paths.items(), what, disable=silent)}


def describe_base(model_config: Any) -> ServedBase:
    """What vLLM's configuration of a model says of it."""
    return ServedBase(
        model_config.get_hidden_size(),
        model_config.hf_text_config.num_hidden_layers,
        model_config.get_vocab_size(),
        model_config.max_model_len,
        model_config.quantization,
    )


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The base model's tokenizer."""
    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


@dataclass(frozen=True, slots=True)
class Attached:
    """What the API process put into a request's sampling parameters."""

    key: tuple[str, int | None]
    """Choices of one request (n > 1) share everything but their seed, so the seed completes the key."""
    plan: Plan
    seed: int
    """Of the Monte Carlo estimates: the request's own, else one of its key."""
    source: Source | None
    """What the prompt was made of, where a reward model reads text."""
    forced: list[int] | None
    """The answer's tokens, where it is scored and not sampled."""


def read_attached(sampling_params: Any) -> Attached | None:
    """None for a request whose tokens are not guided."""
    entry: Mapping[str, Any] | None = (sampling_params.extra_args or {}).get(CONFIG_KEY)
    if not isinstance(entry, Mapping):
        return None
    if "span" in entry:
        return None
    guidance = parse_guidance(entry["guidance"])
    if isinstance(guidance, BestOfN | Blockwise):
        return None
    seed = sampling_params.seed
    noise = int(entry["key"][:15], 16) if seed is None else seed
    source = read_source(entry.get("source"))
    return Attached((entry["key"], seed), compile_plan(guidance), noise, source, entry.get("forced"))


def read_span(sampling_params: Any) -> Span | None:
    """The positions of a prompt whose hidden states are to be kept; None for a request that is not there for them."""
    entry: Mapping[str, Any] | None = (sampling_params.extra_args or {}).get(CONFIG_KEY)
    if not isinstance(entry, Mapping) or "span" not in entry:
        return None
    return Span(entry["key"], *entry["span"])


def read_source(sent: Mapping[str, Any] | None) -> Source | None:
    """What the API process sent of a prompt, as `dataclasses.asdict` writes it."""
    return None if sent is None else Source(**{**sent, "messages": sent["messages"] and tuple(sent["messages"])})
