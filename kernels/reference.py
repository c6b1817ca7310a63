"""The sampling step's kernels in plain torch: what a CPU runs, and the twin that each Triton kernel is held to."""

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
    if limits is not None:
        values = values.masked_fill(torch.arange(k, device=logits.device) >= limits, -torch.inf)
    return ids, values, values - logits.logsumexp(dim=-1, keepdim=True)


def write_candidates(logits: torch.Tensor, rows: torch.Tensor | None, ids: torch.Tensor, scores: torch.Tensor) -> None:
    """Leaves in each of `rows` of logits [B, V] the candidates' scores [G, k] and -inf elsewhere, in place.

    rows: [G] int64, or None for all rows in order. Other rows keep their bits.
    """
    if rows is None:
        logits.fill_(-torch.inf).scatter_(1, ids, scores)
    else:
        logits.index_fill_(0, rows, -torch.inf)
        logits.index_put_((rows.unsqueeze(-1), ids), scores)
