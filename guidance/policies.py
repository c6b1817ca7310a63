"""Policies: causal language models with the base's tokenizer, or adapters over the base, that read one token a step."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from steersman.guidance.cached import NextTokenModel, make_ready
from steersman.guidance.checkpoints import (
    ModelRefused,
    declared_quantization,
    declared_vocabulary,
    find_vocabulary,
    first_line,
    require_safetensors,
    require_vocabulary,
)
from steersman.guidance.head_files import POLICY, HeadCheckpoint, is_head
from steersman.guidance.head_models import HeadPolicy, ServedBase, read_head_checkpoint
from steersman.guidance.tokenizers import same_tokenizer, size_of

ADAPTER_CONFIG = "adapter_config.json"


class Policy(NextTokenModel):
    """Next-token logits of a causal language model for every row, from one new token each."""

    kind = "policy"

    def __init__(self, model: Any, name: str, cache_bytes: int, max_rows: int = 64) -> None:
        super().__init__(model, f"policy {name!r}", name, cache_bytes, max_rows, every_token=True)


def load_policy(
    name: str,
    path: str,
    base_path: str,
    base_tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cache_bytes: int = 256 * 2**20,
    max_rows: int = 64,
    trust_remote_code: bool = False,
    served: ServedBase | None = None,
) -> Policy | HeadPolicy:
    """Loads a causal language model, an adapter (LoRA and other kinds that peft can merge) over the base, or a head.

    base_path: the base model's own checkpoint, which an adapter is merged into. served: the base
    model, which the head of another one does not fit.
    Raises ModelRefused with the reason and the way out. Only safetensors are read.
    """
    checkpoint = read_policy_checkpoint(name, path, base_path, base_tokenizer, dtype, trust_remote_code, served)
    policy = build_policy(name, checkpoint, device, cache_bytes, max_rows, served)
    make_ready(policy)
    return policy


def read_policy_checkpoint(
    name: str,
    path: str,
    base_path: str,
    base_tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    trust_remote_code: bool,
    served: ServedBase | None = None,
) -> Any:
    """The part of loading that needs no device: the model on the host, or a HeadCheckpoint; raises as `load_policy`
    does."""
    if is_head(path):
        return read_head_checkpoint(f"policy {name!r}", path, POLICY, base_tokenizer, served)
    inspect_policy(name, path, base_path, base_tokenizer, trust_remote_code)
    options = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": trust_remote_code}
    try:
        if is_adapter(path):
            model = _merge_adapter(name, path, AutoModelForCausalLM.from_pretrained(base_path, **options))
        else:
            model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
            if missing := sorted(report["missing_keys"]):
                raise ModelRefused(f"policy {name!r}: {path} lacks the weights {', '.join(missing[:3])}")
    except ModelRefused:
        raise
    # What a quantised checkpoint needs may not be installed.
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelRefused(f"policy {name!r}: {path} cannot be loaded: {first_line(error)}") from error
    require_vocabulary(f"policy {name!r}", path, find_vocabulary(model), base_tokenizer)
    return model


def build_policy(
    name: str,
    checkpoint: Any,
    device: torch.device | str,
    cache_bytes: int,
    max_rows: int,
    served: ServedBase | None = None,
) -> Policy | HeadPolicy:
    """A policy of what `read_policy_checkpoint` gave, on its device, not captured and not checked yet; raises
    ModelRefused."""
    if isinstance(checkpoint, HeadCheckpoint):
        return HeadPolicy(checkpoint, name, device, served)
    return Policy(checkpoint.to(device), name, cache_bytes, max_rows)


def inspect_policy(
    name: str, path: str, base_path: str, base_tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool
) -> None:
    """What can be said of a checkpoint without its weights; raises ModelRefused for what cannot be served."""
    label = f"policy {name!r}"
    if is_head(path):
        read_head_checkpoint(label, path, POLICY, base_tokenizer)
        return
    adapter = is_adapter(path)
    require_safetensors(path, label, ADAPTER_CONFIG if adapter else "config.json")
    config = _read_config(label, base_path if adapter else path, trust_remote_code)
    if adapter:
        _require_peft(label)
        _require_full_precision(label, path, base_path, config)
    else:
        _require_language_head(label, path, config)
    if not adapter or (Path(path) / "tokenizer_config.json").is_file():
        _require_tokenizer(label, path, base_tokenizer, trust_remote_code)
    # An adapter is merged into the base and reads what the base reads.
    require_vocabulary(label, path, declared_vocabulary(config), base_tokenizer)


def is_adapter(path: str) -> bool:
    """Whether a local folder holds a PEFT adapter."""
    return os.path.isfile(Path(path) / ADAPTER_CONFIG)


def _require_tokenizer(label: str, path: str, base_tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelRefused(f"{label}: the tokenizer of {path} cannot be read: {first_line(error)}") from error
    if not same_tokenizer(tokenizer, base_tokenizer):
        raise ModelRefused(
            f"{label}: {path} has another vocabulary than the base model ({size_of(tokenizer)} against "
            f"{size_of(base_tokenizer)} tokens, or other ids); distributions can be combined only over the same "
            "tokens: use a policy of the base model's family"
        )


def _merge_adapter(name: str, path: str, base: Any) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base, path).merge_and_unload(safe_merge=True)
    except Exception as error:  # peft raises what it likes for an adapter that does not fit
        raise ModelRefused(
            f"policy {name!r}: the adapter {path} does not fit the base model: {first_line(error)}"
        ) from error


def _require_peft(label: str) -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ModelRefused(f"{label}: an adapter needs the package peft; install it with pip install peft") from error


def _require_full_precision(label: str, path: str, base_path: str, config: Any) -> None:
    # Beside rounded weights most of what an adapter changes would be lost when it is merged into them.
    quantization = declared_quantization(config)
    if quantization is not None:
        raise ModelRefused(
            f"{label}: {path} is an adapter, and the base model {base_path} is quantised ({quantization}), into whose "
            "weights none can be merged: merge it into the base that this one was quantised from, save that, and give "
            "it as the policy"
        )


def _read_config(label: str, path: str, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelRefused(f"{label}: {path} cannot be read: {first_line(error)}") from error


def _require_language_head(label: str, path: str, config: Any) -> None:
    architectures = getattr(config, "architectures", None) or []
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise ModelRefused(
            f"{label}: {path} is a {', '.join(architectures) or 'model without an architecture'}, not a causal "
            "language model (…ForCausalLM)"
        )
