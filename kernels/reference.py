"""The sampling step's kernels in plain torch: what a CPU runs, and the twin that each Triton kernel is held to."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from steersman.kernels.arguments import Blended, BlendedRows, BlendRows, HeadReranked, HeadRows, RewardTerms


def topk_logprobs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `kernels.topk.topk_logprobs`, but for the order of tied entries, which is torch's."""
    totals = logits.float().logsumexp(dim=-1)
    values, ids = logits.float().topk(k, dim=-1)
    logprobs = torch.where(values.isneginf(), values, values - totals.unsqueeze(-1))
    return ids.int(), logprobs, totals


def reward_rerank(
    logits: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    base: torch.Tensor,
    terms: RewardTerms,
    rewards: torch.Tensor,
) -> torch.Tensor:
    """As `kernels.rerank.reward_rerank`."""
    values = terms.scale.unsqueeze(-1) * rewards + terms.shift.unsqueeze(-1)
    values = torch.where(terms.log_sigmoid.unsqueeze(-1) == 1, F.logsigmoid(values), values)
    strength = terms.strength.unsqueeze(-1)
    bonus = torch.where(strength == 0, 0.0, strength * values).sum(dim=1)
    scores = add_rewards(base, bonus)
    written = ~scores.isnan().any(dim=-1) & (rows >= 0)
    write_candidates(logits, rows[written].long(), ids[written].long(), scores[written].to(logits.dtype))
    return scores


def add_rewards(base: torch.Tensor, bonus: torch.Tensor) -> torch.Tensor:
    """Scores [B, k]: base + bonus up to a constant that keeps each row's log-sum-exp, -inf where base is.

    base: [B, k] log π₀ up to a constant, -inf for a candidate that is masked. bonus: [B, k], β Σ w T(r), anything where
    a candidate is masked. A row with another score that is not finite, or without any candidate, is NaN.
    """
    masked = base == -torch.inf
    scores = torch.where(masked, base, base + bonus)
    scores = scores + (base.logsumexp(dim=-1, keepdim=True) - scores.logsumexp(dim=-1, keepdim=True))
    # Any score that is not finite, and a row without a candidate, make others NaN or move the entries of -inf.
    healthy = ((scores == -torch.inf) == masked).all(dim=-1, keepdim=True)
    return torch.where(healthy, scores, torch.nan)


def policy_blend(base: torch.Tensor, policy: torch.Tensor, asked: BlendRows, samples: int = 0) -> Blended:
    """As `kernels.blend.policy_blend`, but for the samples themselves, which are torch's."""
    chosen, policy = _widen(base[asked.rows.clamp(min=0).long()]), _widen(policy)
    kl = measure_kl(policy, chosen)
    estimate = kl
    if samples:
        generators = [torch.Generator(base.device).manual_seed(int(seed)) for seed in asked.seeds]
        estimate = sample_kl(policy, chosen, samples, generators)
    opened = estimate > asked.threshold
    coefficients = torch.where(opened.unsqueeze(-1), asked.above, asked.below)
    is_base = (coefficients == torch.tensor([1.0, 0.0], device=base.device)).all(dim=-1)
    written = (asked.rows >= 0) & ~is_base & ~estimate.isnan()
    blended = blend_logits(chosen, [policy], coefficients.to(chosen.dtype))
    base[asked.rows[written].long()] = blended[written].to(base.dtype)
    return Blended(kl, estimate, opened.int())


def _widen(values: torch.Tensor) -> torch.Tensor:
    """In float32, or in float64 where that is what they are: then the twin is the truth that others are held to."""
    return values if values.dtype is torch.float64 else values.float()


def head_blend(
    logits: torch.Tensor,
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    asked: BlendRows,
    samples: int = 0,
) -> BlendedRows:
    """As `kernels.head_blend.head_blend`, but for the samples themselves, which are torch's."""
    rows, width = asked.rows.clamp(min=0).long(), logits.shape[1]
    base = logits[rows].masked_fill((asked.rows < 0).unsqueeze(-1), -torch.inf)
    outputs = F.linear(features, weight.to(features.dtype), bias.to(features.dtype))[:, :width]
    policy = base + F.pad(outputs, (0, width - outputs.shape[1]), value=-torch.inf)
    whole = base.clone()
    # Every line is a row of its own here, also one whose row is nobody's.
    places = torch.arange(len(rows), dtype=torch.int32, device=logits.device)
    blended = policy_blend(whole, policy, replace(asked, rows=places), samples)
    real = asked.rows >= 0
    logits[rows[real]] = whole[real]
    (base_total, _), (guided_total, _) = find_peaks(base), find_peaks(whole)
    kept = whole.masked_fill(base != base.amax(dim=-1, keepdim=True), -torch.inf).amax(dim=-1)
    changed = kept < whole.amax(dim=-1)
    return BlendedRows(*(blended.kl, blended.estimate, blended.opened), base, whole, base_total, guided_total, changed)


def candidate_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache_keys: torch.Tensor,
    cache_values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """As `kernels.attention.candidate_attention`."""
    rows, heads, fed, width = query.shape
    block = cache_keys.shape[2]
    cached = lengths.clamp(min=0).long()
    columns = torch.arange(tables.shape[1] * block, device=query.device)
    slots = tables[:, columns // block] * block + columns % block
    real = lengths >= 0
    own = slots.gather(1, cached.unsqueeze(-1)).squeeze(-1)
    gathered = []
    for cache, fresh in ((cache_keys, key), (cache_values, value)):
        flat = cache.view(cache.shape[0], -1, width)
        gathered.append(torch.cat((flat[:, slots].transpose(0, 1), fresh), dim=2))
        flat[:, own[real]] = fresh[real, :, 0].transpose(0, 1)
    token = torch.arange(fed, device=query.device)
    branch, depth = (token - 1) % max(k, 1), torch.where(token == 0, 0, 1 + (token - 1) // max(k, 1))
    see_fresh = (branch == branch.unsqueeze(-1)) & (token > 0) & (token <= token.unsqueeze(-1)) | (token == 0)
    seen = torch.cat(
        ((columns < cached.unsqueeze(-1)).unsqueeze(1).expand(-1, fed, -1), see_fresh.expand(rows, -1, -1)), dim=-1
    )
    if window is not None:
        ahead = depth + cached.unsqueeze(-1)
        places = torch.cat((columns.expand(rows, -1), ahead), dim=-1)
        seen = seen & (places.unsqueeze(1) > ahead.unsqueeze(-1) - window)
    keys, values = gathered
    out = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=seen.unsqueeze(1), scale=scale, enable_gqa=heads != key.shape[1]
    )
    return out.transpose(1, 2)


def select_candidates(
    logits: torch.Tensor, k: int, limits: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k most likely tokens of every row.

    logits: [B, V] float32, -inf where a token is masked. limits: [B, 1] candidates that each row wants, at most k;
    None when all want k. Returns ids [B, k] int64, their logits [B, k] with -inf beyond a row's limit, and their
    log-probabilities [B, k] over the whole vocabulary.
    """
    values, ids = logits.topk(k, dim=-1)
    logprobs = logits.log_softmax(dim=-1).gather(1, ids)
    return ids, mask_beyond(values, limits), mask_beyond(logprobs, limits)


def gather_outputs(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tokens: torch.Tensor
) -> torch.Tensor:
    """As `kernels.gather.gather_outputs`."""
    outputs = torch.bmm(F.embedding(tokens, weight).float(), features.float().unsqueeze(-1)).squeeze(-1)
    return outputs if bias is None else outputs + bias[tokens]


def head_rerank(logits: torch.Tensor, features: torch.Tensor, asked: HeadRows) -> HeadReranked:
    """As `kernels.head_rerank.head_rerank`, but for the order of tied candidates, which is torch's."""
    nobody = (asked.rows < 0).unsqueeze(-1)
    base = _widen(logits[asked.rows.clamp(min=0)]).masked_fill(nobody, -torch.inf)
    totals = base.logsumexp(dim=-1, keepdim=True)
    values, ids = base.topk(asked.k, dim=-1)
    values = mask_beyond(torch.where(totals.isnan(), totals, values), asked.limits)
    logprobs = torch.where(values.isneginf(), values, values - totals)
    known = min(len(head.bias) for head in asked.heads)
    parts = features.split([head.tokens.shape[1] for head in asked.heads], dim=1)
    rewards = []
    for part, head in zip(parts, asked.heads, strict=True):
        tokens = ids.clamp(max=len(head.bias) - 1)
        products = torch.bmm(F.embedding(tokens, head.tokens).to(part.dtype), part.unsqueeze(-1)).squeeze(-1)
        rewards.append(products + head.bias[tokens].to(part.dtype))
    stacked, values = torch.stack(rewards, dim=1), values.masked_fill(ids >= known, -torch.inf)
    scores = reward_rerank(logits, asked.rows, ids, values, asked.terms, stacked)
    return HeadReranked(ids, values, logprobs, scores, stacked, scores[:, 0].isnan())


def mask_beyond(values: torch.Tensor, limits: torch.Tensor | None) -> torch.Tensor:
    """values: [B, k]; -inf beyond the first `limits` [B, 1] of each row, or as they are where there are none."""
    if limits is None:
        return values
    return values.masked_fill(torch.arange(values.shape[1], device=values.device) >= limits, -torch.inf)


def write_candidates(logits: torch.Tensor, rows: torch.Tensor | None, ids: torch.Tensor, scores: torch.Tensor) -> None:
    """Leaves in each of `rows` of logits [B, V] the candidates' scores [G, k] and -inf elsewhere, in place.

    rows: [G] int64, or None for all rows in order. Other rows keep their bits.
    """
    if rows is None:
        logits.fill_(-torch.inf).scatter_(1, ids, scores)
    else:
        logits.index_fill_(0, rows, -torch.inf)
        logits.index_put_((rows.unsqueeze(-1), ids), scores)


def find_peaks(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-sum-exp and the most likely token of each row, [G] each, in one look for the largest of [G, V]."""
    largest, best = logits.max(dim=-1, keepdim=True)
    # A row of -inf alone has that for its sum.
    largest = largest.clamp(min=torch.finfo(logits.dtype).min, max=torch.finfo(logits.dtype).max)
    total = (logits - largest).exp_().sum(dim=-1).log_() + largest.squeeze(-1)
    return total, best.squeeze(-1)


def blend_logits(base: torch.Tensor, policies: Sequence[torch.Tensor], coefficients: torch.Tensor) -> torch.Tensor:
    """Σ_p c_p log π_p up to a constant per row.

    base: [G, V] float32, -inf where a token is masked. policies: logits [G, V] each. coefficients: [G, 1 + P], the
    base's first. Returns [G, V], -inf where the base or a policy with a coefficient other than 0 has it.
    """
    masked = base.isneginf()
    blended = coefficients[:, :1] * base.masked_fill(masked, 0.0)
    for number, logits in enumerate(policies, start=1):
        weight = coefficients[:, number : number + 1]
        absent = logits.isneginf()
        masked = masked | (absent & (weight != 0))
        blended = blended + weight * logits.masked_fill(absent, 0.0)
    return blended.masked_fill_(masked, -torch.inf)


def measure_kl(logits: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """KL(π‖π₀) of each row, in nats, over the tokens that neither masks: [G, V] and [G, V] → [G]."""
    logprobs, base_logprobs = _normalise_together(logits, base)
    return (logprobs.exp() * _log_ratio(logprobs, base_logprobs)).sum(dim=-1)


def sample_kl(
    logits: torch.Tensor, base: torch.Tensor, samples: int, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """KL(π‖π₀) of each row estimated as the mean of log π − log π₀ over `samples` draws of π, each row by its own
    generator (Shallow Preference Signals, §3.3.2): [G, V] and [G, V] → [G], unbiased."""
    logprobs, base_logprobs = _normalise_together(logits, base)
    ratio = _log_ratio(logprobs, base_logprobs)
    probabilities = logprobs.exp()
    draws = torch.stack(
        [torch.multinomial(p, samples, True, generator=g) for p, g in zip(probabilities, generators, strict=True)]
    )
    return ratio.gather(1, draws).mean(dim=-1)


def measure_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of each row in nats: [G, V] → [G]."""
    logprobs = logits.log_softmax(dim=-1)
    return -(logprobs.exp() * logprobs.masked_fill(logprobs.isneginf(), 0.0)).sum(dim=-1)


def _normalise_together(logits: torch.Tensor, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    masked = logits.isneginf() | base.isneginf()
    return (
        logits.masked_fill(masked, -torch.inf).log_softmax(dim=-1),
        base.masked_fill(masked, -torch.inf).log_softmax(dim=-1),
    )


def _log_ratio(logprobs: torch.Tensor, base_logprobs: torch.Tensor) -> torch.Tensor:
    return (logprobs - base_logprobs).masked_fill(logprobs.isneginf(), 0.0)
