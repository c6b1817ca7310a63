"""One objective of `steersman train reward`: what of its training differs from the others'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer, suppress_seqcls_warning

from steersman.guidance.tokenizers import same_tokenizer
from steersman.training.accuracy import score_ends
from steersman.training.configuration import ConfigError, load
from steersman.training.data.preferences import TokenizedPreference, load_preferences
from steersman.training.rewards.arguments import RewardArguments

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load_classifier(arguments: RewardArguments, outputs: int = 1) -> Loaded:
    """A classifier, in float32, and its tokenizer with a padding token that is not the end token."""
    with suppress_seqcls_warning():
        model, tokenizer = load(arguments.model, AutoModelForSequenceClassification, num_labels=outputs)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # A classifier pools at the last token that is not padding: the end token would never be scored.
        raise ConfigError(
            f"{arguments.model}: the tokenizer needs a padding token of its own, other than the end token"
        )
    return model, tokenizer


def load_beside(path: str, auto_model: Any, tokenizer: PreTrainedTokenizerBase, **options: Any) -> PreTrainedModel:
    """A frozen model that speaks of the same tokens as the one that is trained."""
    model, own = load(path, auto_model, **options)
    if not same_tokenizer(own, tokenizer):
        raise ConfigError(f"{path} has another tokenizer than the model to train: their token ids must be the same")
    return model.eval().requires_grad_(False)


def window_of(config: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that a prompt and a response have together at most."""
    return config.max_length or tokenizer.model_max_length


Read = Callable[[RewardArguments, RewardConfig, PreTrainedTokenizerBase], Sequence[Any]]


def read_pairs_with(*needed: str) -> Read:
    """Reads the preference pairs of `train_file`, every one of which must have these numbers."""

    def read(
        arguments: RewardArguments, config: RewardConfig, tokenizer: PreTrainedTokenizerBase
    ) -> list[TokenizedPreference]:
        return load_preferences(arguments.train_file, tokenizer, window_of(config, tokenizer), needed=needed)

    return read


read_pairs = read_pairs_with()


@dataclass(frozen=True)
class Recipe:
    """The steps in which one objective differs."""

    seen: str
    """What is trained on, in the words of the model card."""
    describe: Callable[[RewardArguments], dict[str, Any]]
    """Facts for config.json: the loss in words, and the settings that belong to it."""
    make_trainer: Callable[
        [RewardArguments, RewardConfig, PreTrainedModel, PreTrainedTokenizerBase, Sequence[Any]], RewardTrainer
    ]
    """Of what `load` and `read` gave."""
    load: Callable[[RewardArguments], Loaded] = load_classifier
    read: Read = read_pairs
    """The rows that are trained on."""
    rows: str = "pairs"
    """What the rows are."""
    score: Callable[[PreTrainedModel, Sequence[Sequence[int]]], torch.Tensor] = score_ends
    """The rewards of sequences of token ids, [N] float32: what accuracy is measured of."""
    aspects: Callable[[RewardArguments], Sequence[str]] = lambda _: ()
    """Those that the segments of held-out rows must be scored by."""
    measure: Callable[[PreTrainedModel, Sequence[TokenizedPreference]], dict[str, Any]] | None = None
    """Facts about held-out rows, in place of the accuracy of `score`."""
    kind: str = "reward"
    """What the server takes the checkpoint for."""
