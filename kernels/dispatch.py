"""Triton's kernels on a GPU, Numba's or torch elsewhere; either is imported at the first use."""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch

from steersman.kernels import reference
from steersman.kernels.arguments import (
    Blended,
    BlendedRows,
    BlendRows,
    HeadReranked,
    HeadRows,
    HeadWeights,
    Mixed,
    MixRows,
    Reranked,
    RewardTerms,
)


def has_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device."""
    return device.type == "cuda"


@cache
def has_numba() -> bool:
    """Whether the CPU's own kernels can be compiled; vLLM brings Numba along."""
    return find_spec("numba") is not None


def _fits_numba(values: torch.Tensor) -> bool:
    """Whether the CPU's own kernels take a tensor as it lies."""
    return values.dtype is torch.float32 and not has_kernels(values.device) and values.is_contiguous() and has_numba()


def compile_cpu_kernels() -> None:
    """Compiles them, or loads them from the cache, which takes seconds: before a request waits for it."""
    if has_numba():
        from steersman.kernels import cpu  # noqa: F401


def select_candidates(
    logits: torch.Tensor, rows: torch.Tensor, k: int, limits: torch.Tensor | None = None, *, whole: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.select_candidates` for `rows` [G] int64 of the logits [B, V]; with kernels, tied candidates are
    ordered by id. whole: whether the rows are all of them, in order."""
    if _fits_numba(logits):
        from steersman.kernels import cpu

        return cpu.select_candidates(logits, rows, k, limits)
    if not whole:
        logits = logits[rows]
    if not has_kernels(logits.device):
        return reference.select_candidates(logits, k, limits)
    from steersman.kernels.topk import make_workspace, topk_logprobs

    size, vocabulary = logits.shape
    ids, logprobs, totals = topk_logprobs(logits, k, make_workspace(size, vocabulary, logits.device))
    logprobs = reference.mask_beyond(logprobs, limits)
    return ids.long(), logprobs + totals.unsqueeze(-1), logprobs


def write_reranked(
    logits: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, base: torch.Tensor, terms: RewardTerms,
    rewards: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`kernels.rerank.reward_rerank` for rewards that are there already, [B, M, k] float32: scores [B, k], and the rows
    [B] bool whose scores are NaN, which are not written. rows, ids: int64."""
    if _fits_numba(logits):
        from steersman.kernels import cpu

        return cpu.reward_rerank(logits, rows, ids.contiguous(), base.contiguous(), terms, rewards.contiguous())
    if has_kernels(logits.device):
        from steersman.kernels.rerank import reward_rerank

        scores = reward_rerank(logits, rows, ids.contiguous(), base.contiguous(), terms, rewards.contiguous())
    else:
        scores = reference.reward_rerank(logits, rows, ids, base, terms, rewards)
    return scores, scores[:, 0].isnan()


def can_rerank_by_heads(logits: torch.Tensor) -> bool:
    """Whether `rerank_by_heads` is there for these logits [B, V], or with kernels `launch_heads`."""
    return has_kernels(logits.device) or _fits_numba(logits)


def rerank_by_heads(logits: torch.Tensor, hidden: torch.Tensor, asked: HeadRows, done: Reranked, step: int) -> bool:
    """`select_candidates`, the outputs of each head, one a term, and `write_reranked` in one, as `step` of `done`;
    hidden: the base's hidden states [B, D] of any precision. Returns whether every row was written."""
    from steersman.kernels import cpu

    return cpu.rerank_by_heads(logits, hidden.float().contiguous(), asked, done, step)


def tabulate_heads(heads: Sequence[HeadWeights]) -> list[list[int]]:
    """HeadRows.table as numbers; see `kernels.head_rerank.tabulate_heads`."""
    from steersman.kernels import head_rerank

    return head_rerank.tabulate_heads(heads)


def launch_heads(logits: torch.Tensor, hidden: torch.Tensor, asked: HeadRows) -> HeadReranked:
    """As `rerank_by_heads` on a device with kernels: f(h) of every head, and the two launches of `kernels.head_rerank`
    with a workspace of their own. hidden: the base's hidden states of the asked rows, [G, D] of any precision."""
    from steersman.kernels.head_rerank import head_rerank, make_workspace

    (lines, vocabulary), states = (len(asked.rows), logits.shape[1]), hidden.float()
    ranks = [len(head.outer_bias) for head in asked.heads]
    features = torch.empty(lines, sum(ranks), dtype=torch.float32, device=logits.device)
    for head, part in zip(asked.heads, features.split(ranks, dim=1), strict=True):
        head.features(states, out=part)
    return head_rerank(logits, features, asked, make_workspace(lines, vocabulary, logits.device))


def compile_head_rerank(weight: torch.Tensor, vocabulary: int) -> None:
    """Compiles what `launch_heads` launches over logits [B, vocabulary]; nothing where there are no kernels."""
    if not has_kernels(weight.device):
        return
    from steersman.kernels.production import distinct_launches, head_rerank_launches

    for launch in distinct_launches(head_rerank_launches(weight.dtype, weight.shape[1], vocabulary)).values():
        launch.compile()


def gather_outputs(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tokens: torch.Tensor
) -> torch.Tensor:
    """`kernels.gather.gather_outputs`: outputs of a linear layer for a few tokens of each row."""
    if has_kernels(features.device):
        from steersman.kernels import gather

        return gather.gather_outputs(features, weight, bias, tokens)
    if _fits_numba(weight) and not weight.requires_grad:
        from steersman.kernels import cpu

        return cpu.gather_outputs(features.float().contiguous(), weight, bias, tokens.contiguous())
    return reference.gather_outputs(features, weight, bias, tokens)


def choose_rank(rank: int, device: torch.device) -> int:
    """Channels that a linear layer should have there, the last of them 0: rows at multiples of 64 bytes are read 16
    bytes at a time, others 4."""
    return -(-rank // 16) * 16 if has_kernels(device) else rank


def compile_gather(weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Compiles what `gather_outputs` launches for a layer; nothing where there are no kernels."""
    if not has_kernels(weight.device):
        return
    from steersman.kernels.production import output_layer_launches

    for launch in output_layer_launches(weight.dtype, weight.shape[1], bias is not None).values():
        launch.compile()


def blend_policy(logits: torch.Tensor, policy: torch.Tensor, asked: BlendRows, samples: int) -> Blended:
    """`kernels.blend.policy_blend` with a workspace of its own."""
    from steersman.kernels.blend import make_workspace, policy_blend

    workspace = make_workspace(len(policy), policy.shape[-1], logits.device)
    return policy_blend(logits, policy, asked, workspace, samples)


def blend_head(
    logits: torch.Tensor,
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    asked: BlendRows,
    samples: int,
    gated: bool,
) -> BlendedRows:
    """`kernels.head_blend.head_blend` with a workspace of its own."""
    from steersman.kernels.head_blend import head_blend, make_workspace

    workspace = make_workspace(len(features), logits.shape[-1], logits.device)
    return head_blend(logits, features.contiguous(), weight, bias, asked, workspace, samples, gated)


def compile_head_blend(weight: torch.Tensor, bias: torch.Tensor, vocabulary: int) -> None:
    """Compiles what `blend_head` launches over logits [B, vocabulary]; nothing where there are no kernels."""
    if not has_kernels(weight.device):
        return
    from steersman.kernels.production import distinct_launches, head_blend_launches

    for launch in distinct_launches(head_blend_launches(weight.dtype, weight.shape[1], vocabulary)).values():
        launch.compile()


def can_blend_on_cpu(logits: torch.Tensor) -> bool:
    """Whether `blend_on_cpu` is there for these logits [B, V]."""
    return _fits_numba(logits)


def blend_on_cpu(
    logits: torch.Tensor, rows: torch.Tensor, outputs: torch.Tensor, coefficients: torch.Tensor, *, is_change: bool
) -> Mixed:
    """`kernels.cpu.blend`, which writes a mixture of the base and one policy; outputs: [G, V] float32, contiguous."""
    from steersman.kernels import cpu

    return cpu.blend(logits, rows, outputs, coefficients, is_change=is_change)


def blend_by_head(logits: torch.Tensor, hidden: torch.Tensor, asked: MixRows, mixed: Mixed) -> bool:
    """`kernels.cpu.blend_by_head`, where `can_blend_on_cpu`; hidden: the base's hidden states [B, D] of any
    precision."""
    from steersman.kernels import cpu

    return cpu.blend_by_head(logits, hidden.float().contiguous(), asked, mixed)


def choose_mixed(mixed: Mixed, tokens: torch.Tensor, values: np.ndarray) -> None:
    """As `kernels.cpu.choose_mixed`: what mixed rows give to their tokens [G] int64, into values [G, 4] float32; where
    `can_blend_on_cpu`."""
    from steersman.kernels import cpu

    cpu.choose_mixed(mixed, tokens, values)


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
