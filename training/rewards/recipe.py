"""One objective of `steersman train reward`: what of its training differs from the others'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer, suppress_seqcls_warning

from steersman.guidance.checkpoints import is_causal
from steersman.guidance.tokenizers import same_tokenizer
from steersman.training.accuracy import score_ends
from steersman.training.configuration import ConfigError, load
from steersman.training.data.preferences import TokenizedPreference, load_preferences
from steersman.training.rewards.arguments import RewardArguments

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load_classifier(arguments: RewardArguments, outputs: int = 1) -> Loaded:
    """A classifier, in float32, and its tokenizer."""
    with suppress_seqcls_warning():
        return load(arguments.model, AutoModelForSequenceClassification, num_labels=outputs)


def check_padding(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError where padding is the end token, for a model that isn't causal: encoders compute places and
    pool by the tokens that are not padding."""
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be loaded: {str(error).splitlines()[0]}") from None
    if not is_causal(config):
        raise ConfigError(
            f"pad_token: {path} is no causal model and would take its end token, {tokenizer.eos_token!r}, for padding: "
            "name another token of its vocabulary (--pad_token TOKEN)"
        )


def load_beside(path: str, auto_model: Any, tokenizer: PreTrainedTokenizerBase, **options: Any) -> PreTrainedModel:
    """A frozen model that speaks of the same tokens as the one that is trained."""
    model, own = load(path, auto_model, **options)
    if not same_tokenizer(own, tokenizer):
        raise ConfigError(f"{path} has another tokenizer than the model to train: their token ids must be the same")
    text = model.config.get_text_config()
    if text.pad_token_id is None:
        text.pad_token_id = tokenizer.pad_token_id  # a classifier refuses batches without one
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
    score: Callable[..., torch.Tensor] = score_ends
    """The rewards [N] float32 of sequences of token ids, read `batch` at a time: what accuracy is measured of."""
    aspects: Callable[[RewardArguments], Sequence[str]] = lambda _: ()
    """Those that the segments of held-out rows must be scored by."""
    measure: Callable[[PreTrainedModel, Sequence[TokenizedPreference]], dict[str, Any]] | None = None
    """Facts about held-out rows, in place of the accuracy of `score`."""
    kind: str = "reward"
    """What the server takes the checkpoint for."""
