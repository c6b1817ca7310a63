"""How often a score puts the chosen response above the rejected, by how much of the two it sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from steersman.training.data.preferences import TokenizedPreference
from steersman.training.outputs import end_scores, token_logits
from steersman.training.prefixes import SHARES, cut, tokens_at


def accuracy_of(
    at_cuts: Callable[[Sequence[int]], tuple[torch.Tensor, torch.Tensor]],
    rows: Sequence[TokenizedPreference],
    shares: Sequence[float] = SHARES,
) -> dict[str, float]:
    """Share of the longer response → accuracy, both responses cut at the same number of tokens; a tie counts half.

    at_cuts: the scores of all chosen and of all rejected responses, [N] each, given where each of the N rows is cut.
    """
    accuracy = {}
    for share in shares:
        cuts = [tokens_at(share, row.longer) for row in rows]
        chosen, rejected = at_cuts(cuts)
        # Responses that are equal up to the cut are a tie, whichever way rounding puts their scores.
        equal = [cut(row.chosen, i) == cut(row.rejected, i) for row, i in zip(rows, cuts, strict=True)]
        tie = torch.tensor(equal) | (chosen == rejected)
        accuracy[f"{share:g}"] = round(torch.where(tie, 0.5, (chosen > rejected).double()).mean().item(), 4)
    return accuracy


def score_ends(model: PreTrainedModel, sequences: Sequence[Sequence[int]], batch: int = 64) -> torch.Tensor:
    """Of a classifier: the score of each sequence of token ids, [N] float32, on the CPU."""
    return _by_length(model, sequences, batch, lambda ids, mask: end_scores(model, model, ids, mask)[:, 0])


def score_last_tokens(model: PreTrainedModel, sequences: Sequence[Sequence[int]], batch: int = 64) -> torch.Tensor:
    """Of a vocabulary head: each sequence's last token's output before it, [N] float32, on the CPU."""

    def outputs(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        last = mask.sum(dim=1, keepdim=True) - 1
        tokens = ids.gather(1, last).unsqueeze(-1)
        return token_logits(model, model, {"input_ids": ids, "attention_mask": mask}, last, tokens)[:, 0, 0]

    return _by_length(model, sequences, batch, outputs)


@torch.inference_mode()
def _by_length(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    batch: int,
    outputs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`outputs` of padded ids and masks [B, T], [B] each; sequences of like length share a batch."""
    was_training = model.training
    model.eval()
    pad = model.config.get_text_config().pad_token_id or 0
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    scores = torch.empty(len(sequences))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        length = len(sequences[rows[-1]])
        ids = torch.tensor([[*sequences[i], *[pad] * (length - len(sequences[i]))] for i in rows])
        mask = torch.tensor([[1] * len(sequences[i]) + [0] * (length - len(sequences[i])) for i in rows])
        scores[torch.tensor(rows)] = outputs(ids.to(model.device), mask.to(model.device)).float().cpu()
    model.train(was_training)
    return scores


def accuracy_by_share(
    model: PreTrainedModel,
    rows: Sequence[TokenizedPreference],
    score: Callable[[PreTrainedModel, Sequence[Sequence[int]]], torch.Tensor] = score_ends,
    shares: Sequence[float] = SHARES,
) -> dict[str, float]:
    """Of a reward model: share of the longer response → accuracy, as `accuracy_of` measures it; `score` reads it, by
    default as a classifier."""

    def at_cuts(cuts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = score(model, [row.prompt + cut(row.chosen, i) for row, i in zip(rows, cuts, strict=True)])
        rejected = score(model, [row.prompt + cut(row.rejected, i) for row, i in zip(rows, cuts, strict=True)])
        return chosen, rejected

    return accuracy_of(at_cuts, rows, shares)
