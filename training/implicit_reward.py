"""The reward that a policy trained by DPO stands for, against the reference it was trained from."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from steersman.training.accuracy import Rows


def implicit_reward(
    policy: PreTrainedModel, reference: PreTrainedModel, rows: Rows, beta: float, batch: int = 8
) -> Tensor:
    """r(x, y) = β log( π(y|x) / π_ref(y|x) ), the sum over the response's tokens: DPO (arXiv:2305.18290), equation 5
    without its term β log Z(x), which is the same for all responses to a prompt.

    rows: N prompts and responses as token ids, a response perhaps cut (Shallow Preference Signals, §3.3).
    Returns [N] float32, on the CPU. Raises ValueError for an empty prompt, which leaves a first token unpredicted.
    """
    return beta * (log_likelihood(policy, rows, batch) - log_likelihood(reference, rows, batch))


@torch.inference_mode()
def log_likelihood(model: PreTrainedModel, rows: Rows, batch: int = 8) -> Tensor:
    """log π(y|x) of each row: [N] float32, on the CPU. Rows of like length share a batch; equal rows are read once."""
    if any(not prompt for prompt, _ in rows):
        raise ValueError("a prompt has at least one token: the first token of a sequence is predicted by nothing")
    was_training = model.training
    model.eval()
    # Read once, equal rows have exactly equal values: where two cut responses agree, their order is a tie.
    sequences = sorted({(tuple(prompt), tuple(response)) for prompt, response in rows}, key=_length)
    values: list[float] = []
    for start in range(0, len(sequences), batch):
        values += _batch_log_likelihood(model, sequences[start : start + batch]).tolist()
    model.train(was_training)
    of_sequence = dict(zip(sequences, values, strict=True))
    return torch.tensor([of_sequence[tuple(prompt), tuple(response)] for prompt, response in rows])


def _length(sequence: tuple[tuple[int, ...], tuple[int, ...]]) -> int:
    return len(sequence[0]) + len(sequence[1])


def _batch_log_likelihood(model: PreTrainedModel, rows: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Tensor:
    """[B] float32; padded on the right, where a causal model's other positions don't see it."""
    length = max(map(_length, rows))
    # Which token stands in for padding doesn't matter: it is masked, and its own prediction isn't summed.
    ids = torch.tensor(
        [[*prompt, *response, *[0] * (length - len(prompt) - len(response))] for prompt, response in rows]
    )
    position = torch.arange(length)
    ends = torch.tensor([_length(row) for row in rows])[:, None]
    starts = torch.tensor([len(prompt) for prompt, _ in rows])[:, None]
    inputs = {"input_ids": ids.to(model.device), "attention_mask": (position < ends).long().to(model.device)}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()  # [B, T − 1, V]
    losses = functional.cross_entropy(logits.transpose(1, 2), inputs["input_ids"][:, 1:], reduction="none").cpu()
    in_response = ((position >= starts) & (position < ends))[:, 1:]
    return -(losses * in_response).sum(1)
