"""What the kernels are timed against: the same in plain torch, as it can be captured in a CUDA graph, and libraries'.

Nothing here indexes by a mask or asks for a value, so that eager torch, torch.compile and our kernels run from graphs
alike. Every row is written; no row is ill.
"""

import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F

from steersman.kernels.arguments import BlendRows, HeadRows, RewardTerms

Tensors = tuple[torch.Tensor, ...]


def topk(logits: torch.Tensor, k: int) -> Tensors:
    """logits [B, V] → ids [B, k], log-probabilities [B, k], log-sum-exps [B]."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    totals = wide.logsumexp(dim=-1)
    values, ids = wide.topk(k, dim=-1)
    return ids.int(), values - totals.unsqueeze(-1), totals


def other_topks(device: torch.device, k: int) -> dict[str, Callable[..., Tensors]]:
    """FlashInfer's selection, which computes no log-probabilities, and vLLM's own way to top log-probabilities: torch's
    selection, then a kernel that normalises. Those that are installed, for GPUs only."""
    versions: dict[str, Callable[..., Tensors]] = {}
    if device.type != "cuda":
        return versions
    if importlib.util.find_spec("flashinfer") is not None:
        flashinfer = importlib.import_module("flashinfer")
        versions["FlashInfer top_k"] = lambda logits: (flashinfer.top_k(logits, k, sorted=True)[1],)
    try:
        from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs
    except ImportError:
        return versions

    def vllm(logits: torch.Tensor) -> Tensors:
        ids = logits.topk(k, dim=-1).indices
        return ids, compute_token_logprobs(logits, ids)

    return {**versions, "vLLM": vllm}


def rerank(
    logits: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor, terms: RewardTerms,
    rewards: torch.Tensor,
) -> Tensors:  # fmt: skip
    """As `kernels.rerank.reward_rerank` over all rows in order: returns scores [B, k] and `logits`, written."""
    values = terms.scale.unsqueeze(-1) * rewards + terms.shift.unsqueeze(-1)
    values = torch.where(terms.log_sigmoid.unsqueeze(-1) == 1, F.logsigmoid(values), values)
    scores = logprobs + (terms.strength.unsqueeze(-1) * values).sum(dim=1)
    scores = scores + (logprobs.logsumexp(dim=-1, keepdim=True) - scores.logsumexp(dim=-1, keepdim=True))
    logits.fill_(-torch.inf).scatter_(1, ids.long(), scores.to(logits.dtype))
    return scores, logits


def gather(features: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> Tensors:
    """As `kernels.gather.gather_outputs` without a bias: outputs [B, k]."""
    rows = F.embedding(tokens.long(), weight).to(features.dtype)
    return (torch.bmm(rows, features.unsqueeze(-1)).squeeze(-1),)


def head_rerank(logits: torch.Tensor, features: torch.Tensor, asked: HeadRows) -> Tensors:
    """As `kernels.head_rerank.head_rerank` over all rows in order, each with k candidates, which all heads have: scores
    [B, k], `logits`, written, the candidates' log-probabilities [B, k] and rewards [B, M, k]."""
    ids, logprobs, _ = topk(logits, asked.k)
    values = logits.gather(1, ids.long())
    parts = features.split([head.tokens.shape[1] for head in asked.heads], dim=1)
    outputs = [
        gather(part, head.tokens, ids)[0] + F.embedding(ids.long(), head.bias.unsqueeze(-1)).squeeze(-1)
        for part, head in zip(parts, asked.heads, strict=True)
    ]
    rewards = torch.stack(outputs, dim=1)
    scores, written = rerank(logits, asked.rows, ids, values, asked.terms, rewards)
    return scores, written, logprobs, rewards


def blend(base: torch.Tensor, policy: torch.Tensor, asked: BlendRows, samples: int) -> Tensors:
    """As `kernels.blend.policy_blend` over all rows in order: returns the exact KL [B] and `base`, written. With
    samples the gate is decided by so many draws of the policy."""
    p, q = policy.log_softmax(dim=-1), base.log_softmax(dim=-1)
    ratio, probabilities = p - q, p.exp()
    kl = (probabilities * ratio).sum(dim=-1)
    estimate = kl
    if samples:
        estimate = ratio.gather(1, torch.multinomial(probabilities, samples, replacement=True)).mean(dim=-1)
    open_rows = (estimate > asked.threshold).unsqueeze(-1)
    coefficients = torch.where(open_rows, asked.above, asked.below)
    base.copy_(coefficients[:, :1] * base + coefficients[:, 1:] * policy)
    return kl, base


def head_blend(
    base: torch.Tensor, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, asked: BlendRows
) -> Tensors:
    """As `kernels.head_blend.head_blend` over all rows in order: the policy's logits [B, V] are made first. Returns the
    exact KL [B], `base`, written, and copies of it before and after."""
    before = base.clone()
    kl, _ = blend(base, base + F.linear(features, weight, bias), asked, 0)
    return kl, base, before, base.clone()


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache_keys: torch.Tensor, cache_values: torch.Tensor,
    tables: torch.Tensor, lengths: torch.Tensor, k: int, scale: float,
) -> tuple[torch.Tensor]:  # fmt: skip
    """As `kernels.attention.candidate_attention` for rows that are all there and one token a candidate: the prefix
    is gathered, and torch's attention function gets a mask."""
    rows, heads, fed, width = query.shape
    block = cache_keys.shape[2]
    columns = torch.arange(tables.shape[1] * block, device=query.device)
    slots = tables[:, columns // block] * block + columns % block
    last = slots.gather(1, lengths.long().unsqueeze(-1)).squeeze(-1)
    joined = []
    for cache, fresh in ((cache_keys, key), (cache_values, value)):
        flat = cache.view(cache.shape[0], -1, width)
        joined.append(torch.cat((flat[:, slots].transpose(0, 1), fresh), dim=2))
        flat[:, last] = fresh[:, :, 0].transpose(0, 1)
    token = torch.arange(fed, device=query.device)
    own = (token == token.unsqueeze(-1)) | (token == 0)
    prefix = (columns < lengths.unsqueeze(-1)).unsqueeze(1).expand(-1, fed, -1)
    seen = torch.cat((prefix, own.expand(rows, -1, -1)), dim=-1).unsqueeze(1)
    grouped = heads != key.shape[1]
    keys, values = joined
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=scale, enable_gqa=grouped)
    return (out.transpose(1, 2),)
