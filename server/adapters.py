"""What the adapters for vLLM's two model runners share, and which of them fits."""

from collections.abc import Sequence
from typing import Any

import torch

from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.transfer import to_device

_V1 = "steersman.server.logits_v1:GuidanceLogitsProcessor"
_V2 = "steersman.server.logits_v2:GuidanceLogitsProcessor"

_OPTION = "--speculative-config"

NOT_ATTACHED = "guidance is not attached to the model runner: call steersman_prepare on the workers before any request"


def attach_adapter(vllm_config: Any) -> None:
    """Adds the guidance processor to a VllmConfig's logits processors, behind those that are there.

    The runner is looked up with a processor in place: releases of vLLM differ in whether custom processors are a reason
    against Model Runner V2.
    """
    model_config = vllm_config.model_config
    others = list(model_config.logits_processors or [])
    model_config.logits_processors = [*others, _V1]
    if getattr(vllm_config, "use_v2_model_runner", False):
        model_config.logits_processors = [*others, _V2]


def require_exact_drafts(vllm_config: Any) -> None:
    """Raises ModelRefused for a way of speculative decoding under which guided tokens would not follow their
    distribution."""
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    if not getattr(vllm_config, "use_v2_model_runner", False):
        raise ModelRefused(
            f"{_OPTION}: guidance works with speculative decoding in vLLM's Model Runner V2 alone, which needs Triton "
            "and is not used here; leave it out"
        )
    if speculative.rejection_sample_method == "synthetic":
        raise ModelRefused(
            f"{_OPTION}: rejection_sample_method synthetic accepts drafts whatever the model's distribution is; choose "
            "standard or block"
        )
    if speculative.enable_adaptive_verification:
        raise ModelRefused(
            f"{_OPTION}: with enable_adaptive_verification the rows of a guided request cannot be found; leave it out"
        )
    if vllm_config.parallel_config.enable_batch_sharded_sampling:
        raise ModelRefused(
            f"{_OPTION}: guidance does not work with speculative decoding and --enable-batch-sharded-sampling at once; "
            "leave one of the two out"
        )


def changes_logits(params: Any) -> bool:
    """Whether a request's sampling parameters bias or mask logits before penalties, temperature and the like."""
    return bool(
        params.logit_bias
        or params.allowed_token_ids is not None
        or params.bad_words
        or params.min_tokens
        or params.structured_outputs is not None
    )


def force_tokens(logits: torch.Tensor, rows: Sequence[tuple[int, Sequence[int], int]]) -> None:
    """Leaves one token possible in some rows of `logits` [rows, V], in place.

    rows: index of each, the tokens of its answer, and how many of them are there already; a row whose answer is
    complete is left alone.
    """
    forced = [(index, tokens[position]) for index, tokens, position in rows if position < len(tokens)]
    if forced:
        index, tokens = (
            to_device([index for index, _ in forced], logits.device),
            to_device([token for _, token in forced], logits.device),
        )
        logits.index_fill_(0, index, -torch.inf)
        logits[index, tokens] = 0.0
