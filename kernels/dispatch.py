"""Triton's kernels on a GPU, torch elsewhere. Triton is imported at the first use: a CPU needs none."""

import torch

from steersman.kernels import reference
from steersman.kernels.arguments import Blended, BlendRows, RewardTerms


def has_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device."""
    return device.type == "cuda"


def select_candidates(
    logits: torch.Tensor, k: int, limits: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.select_candidates`; with kernels, tied candidates are ordered by id."""
    if not has_kernels(logits.device):
        return reference.select_candidates(logits, k, limits)
    from steersman.kernels.topk import make_workspace, topk_logprobs

    rows, vocabulary = logits.shape
    ids, logprobs, totals = topk_logprobs(logits, k, make_workspace(rows, vocabulary, logits.device))
    logprobs = reference.mask_beyond(logprobs, limits)
    return ids.long(), logprobs + totals.unsqueeze(-1), logprobs


def write_reranked(
    logits: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, base: torch.Tensor, terms: RewardTerms,
    rewards: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """`kernels.rerank.reward_rerank` for rewards that are there already, [B, M, k] float32."""
    from steersman.kernels.rerank import reward_rerank

    return reward_rerank(logits, rows.int(), ids.int(), base.contiguous(), terms, rewards.contiguous())


def blend_policy(logits: torch.Tensor, policy: torch.Tensor, asked: BlendRows, samples: int) -> Blended:
    """`kernels.blend.policy_blend` with a workspace of its own."""
    from steersman.kernels.blend import make_workspace, policy_blend

    workspace = make_workspace(len(policy), policy.shape[-1], logits.device)
    return policy_blend(logits, policy, asked, workspace, samples)


def attend_candidates(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    tables: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """`kernels.attention.candidate_attention` over a layer's cached keys and values."""
    from steersman.kernels.attention import candidate_attention

    return candidate_attention(query, key, value, *cache, tables, lengths, k, scale, window)
