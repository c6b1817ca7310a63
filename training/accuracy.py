"""How often a score puts the chosen response above the rejected, by how much of the two it sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from steersman.training.data import TokenizedPreference
from steersman.training.prefixes import SHARES, cut, tokens_at

Rows = Sequence[tuple[list[int], list[int]]]  # prompt and response, as token ids


def accuracy_by_share(
    model: PreTrainedModel, rows: Sequence[TokenizedPreference], shares: Sequence[float] = SHARES
) -> dict[str, float]:
    """Of a reward model: share of the longer response → accuracy, as `accuracy_of` measures it."""
    return accuracy_of(lambda cuts: score(model, [prompt + response for prompt, response in cuts]), rows, shares)


def accuracy_of(
    scores: Callable[[Rows], torch.Tensor], rows: Sequence[TokenizedPreference], shares: Sequence[float] = SHARES
) -> dict[str, float]:
    """Share of the longer response → accuracy, both responses cut at the same number of tokens; a tie counts half.

    scores: of N rows of prompt and response, [N].
    """
    return {f"{share:g}": _accuracy(scores, rows, share) for share in shares}


def _accuracy(scores: Callable[[Rows], torch.Tensor], rows: Sequence[TokenizedPreference], share: float) -> float:
    cuts = [tokens_at(share, row.longer) for row in rows]
    chosen = scores([(row.prompt, cut(row.chosen, i)) for row, i in zip(rows, cuts, strict=True)])
    rejected = scores([(row.prompt, cut(row.rejected, i)) for row, i in zip(rows, cuts, strict=True)])
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    return round(right.mean().item(), 4)


@torch.inference_mode()
def score(model: PreTrainedModel, sequences: Sequence[Sequence[int]], batch: int = 64) -> torch.Tensor:
    """The score of each sequence of token ids: [N] float32, on the CPU. Sequences of like length share a batch."""
    was_training = model.training
    model.eval()
    pad = model.config.get_text_config().pad_token_id
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    scores = torch.empty(len(sequences))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        length = len(sequences[rows[-1]])
        ids = torch.tensor([[*sequences[i], *[pad] * (length - len(sequences[i]))] for i in rows])
        mask = torch.tensor([[1] * len(sequences[i]) + [0] * (length - len(sequences[i])) for i in rows])
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
        scores[torch.tensor(rows)] = logits[:, 0].float().cpu()
    model.train(was_training)
    return scores
