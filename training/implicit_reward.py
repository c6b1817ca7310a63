"""The reward that a policy trained by DPO stands for, against the reference it was trained from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steersman.training.accuracy import accuracy_of
from steersman.training.data.preferences import TokenizedPreference
from steersman.training.outputs import token_log_probabilities

Rows = Sequence[tuple[Sequence[int], Sequence[int]]]  # prompt and response, as token ids


def implicit_reward(
    policy: PreTrainedModel, reference: PreTrainedModel, rows: Rows, beta: float, batch: int = 8
) -> Tensor:
    """r(x, y) = β log( π(y|x) / π_ref(y|x) ), the sum over the response's tokens: DPO (arXiv:2305.18290), equation 5
    without its term β log Z(x), which is the same for all responses to a prompt.

    rows: N prompts and responses, a response perhaps cut (Shallow Preference Signals, §3.3).
    Returns [N] float32, on the CPU. Raises ValueError for an empty prompt, which leaves a first token unpredicted.
    """
    ratios = token_log_ratios(policy, reference, rows, batch)
    return beta * torch.stack([row.sum() for row in ratios])


def implicit_accuracy(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    rows: Sequence[TokenizedPreference],
    beta: float,
    batch: int = 8,
) -> dict[str, float]:
    """Of the implicit reward: share of the longer response → accuracy, as `accuracy_of` measures it."""
    # Both models are causal: the reward of a cut response is a sum over the first tokens of the whole one.
    sums = [
        [beta * ratios.cumsum(0) for ratios in token_log_ratios(policy, reference, responses, batch)]
        for responses in ([(row.prompt, row.chosen) for row in rows], [(row.prompt, row.rejected) for row in rows])
    ]

    def at_cuts(cuts: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen, rejected = (
            torch.stack([row[min(i, len(row)) - 1] for row, i in zip(side, cuts, strict=True)]) for side in sums
        )
        return chosen, rejected

    return accuracy_of(at_cuts, rows)


def token_log_ratios(policy: PreTrainedModel, reference: PreTrainedModel, rows: Rows, batch: int = 8) -> list[Tensor]:
    """log( π(y_t|x, y_<t) / π_ref(y_t|x, y_<t) ) at every token of each response: N tensors [T_n] float32."""
    pairs = zip(_log_probabilities(policy, rows, batch), _log_probabilities(reference, rows, batch), strict=True)
    return [ours - theirs for ours, theirs in pairs]


@torch.inference_mode()
def _log_probabilities(model: PreTrainedModel, rows: Rows, batch: int) -> list[Tensor]:
    """Of each response's tokens: N tensors [T_n] float32, on the CPU. Rows of like length share a batch."""
    if not all(prompt for prompt, _ in rows):
        raise ValueError("a prompt has at least one token: the first token of a sequence is predicted by nothing")
    was_training = model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda n: len(rows[n][0]) + len(rows[n][1]))
    values = [torch.empty(0)] * len(rows)
    for start in range(0, len(order), batch):
        group = order[start : start + batch]
        for n, row in zip(group, _batch_log_probabilities(model, [rows[n] for n in group]), strict=True):
            values[n] = row
    model.train(was_training)
    return values


def _batch_log_probabilities(model: PreTrainedModel, rows: Rows) -> list[Tensor]:
    sequences = [[*prompt, *response] for prompt, response in rows]
    length = max(map(len, sequences))
    # On the right, where a causal model's other positions don't see it, any token can stand in for padding.
    ids = torch.tensor([sequence + [0] * (length - len(sequence)) for sequence in sequences], device=model.device)
    mask = torch.tensor([[1] * len(sequence) + [0] * (length - len(sequence)) for sequence in sequences])
    values = token_log_probabilities(model, ids, mask.to(model.device)).cpu()
    return [
        row[len(prompt) - 1 : len(prompt) + len(response) - 1]
        for row, (prompt, response) in zip(values, rows, strict=True)
    ]
