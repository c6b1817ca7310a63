"""The sampling step's kernels in plain torch: what a CPU runs, and the twin that each Triton kernel is held to."""

from collections.abc import Sequence

import torch


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
    if limits is not None:
        beyond = torch.arange(k, device=logits.device) >= limits
        values, logprobs = values.masked_fill(beyond, -torch.inf), logprobs.masked_fill(beyond, -torch.inf)
    return ids, values, logprobs


def write_candidates(logits: torch.Tensor, rows: torch.Tensor | None, ids: torch.Tensor, scores: torch.Tensor) -> None:
    """Leaves in each of `rows` of logits [B, V] the candidates' scores [G, k] and -inf elsewhere, in place.

    rows: [G] int64, or None for all rows in order. Other rows keep their bits.
    """
    if rows is None:
        logits.fill_(-torch.inf).scatter_(1, ids, scores)
    else:
        logits.index_fill_(0, rows, -torch.inf)
        logits.index_put_((rows.unsqueeze(-1), ids), scores)


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
