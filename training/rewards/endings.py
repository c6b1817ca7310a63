"""Special tokens that end a text: a model that reads whole texts is given each prefix with them, as the server does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steersman.guidance.checkpoints import is_causal

Score = Callable[[PreTrainedModel, Sequence[Sequence[int]]], torch.Tensor]


def ending_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts behind every text: [SEP] for BERT and its kin, for most causal models nothing."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    count = special[::-1].index(0)
    return list(ids[len(ids) - count :])


def ending_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a prefix must end with for this model: nothing for a causal one, which reads it token by token."""
    return [] if is_causal(model.config) else ending_tokens(tokenizer)


def with_ending(ids: Sequence[int], ending: Sequence[int]) -> list[int]:
    """The ids, ended once."""
    return list(ids) if list(ids[-len(ending) :]) == list(ending) else [*ids, *ending]


def without_ending(ids: Sequence[int], ending: Sequence[int]) -> list[int]:
    """The ids without the ending, where they have it."""
    return list(ids[: -len(ending)]) if ending and list(ids[-len(ending) :]) == list(ending) else list(ids)


def ended(score: Score, ending: Sequence[int]) -> Score:
    """A score of prefixes that are given their ending first."""
    return lambda model, sequences: score(model, [with_ending(ids, ending) for ids in sequences])
