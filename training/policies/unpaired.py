"""KTO: TRL's trainer over each response of a pair by itself, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from steersman.training.configuration import ConfigError
from steersman.training.data.preferences import TokenizedPreference
from steersman.training.policies.method import Method


class TokenizedKTOTrainer(KTOTrainer):
    """TRL's trainer over rows of token ids; its own preparation takes text only and ends every response."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def unpaired(rows: Sequence[TokenizedPreference], batch: int) -> Dataset:
    """Every response as a row of its own, with the columns of TRL's collator; a batch holds pairs, chosen ones first.

    `KL_completion_ids` is the response before it in the batch, which belongs to another prompt wherever a batch has two
    pairs or more: KTO's estimate of the KL is of mismatched prompts and responses.
    """
    examples: list[dict[str, Any]] = []
    pairs = max(1, batch // 2)
    for start in range(0, len(rows), pairs):
        for side, label in (("chosen", True), ("rejected", False)):
            examples += [
                {"prompt_ids": row.prompt, "completion_ids": getattr(row, side), "label": label}
                for row in rows[start : start + pairs]
            ]
    for start in range(0, len(examples), batch):
        own = [example["completion_ids"] for example in examples[start : start + batch]]
        for example, other in zip(examples[start : start + batch], [own[-1], *own[:-1]], strict=True):
            example["KL_completion_ids"] = other
    return Dataset.from_list(examples)


def _make_trainer(
    config: KTOConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedPreference],
    lora: LoraConfig | None,
) -> TokenizedKTOTrainer:
    dataset = unpaired(rows, config.per_device_train_batch_size)
    return TokenizedKTOTrainer(model, args=config, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)


def _check(config: KTOConfig) -> None:
    batch = config.per_device_train_batch_size
    if batch < 4 or batch % 2:
        raise ConfigError(
            f"per_device_train_batch_size counts single responses in method kto, whole pairs of at least two prompts: "
            f"an even number of at least 4, not {batch}"
        )
    if config.train_sampling_strategy != "sequential":
        raise ConfigError(
            f"train_sampling_strategy: {config.train_sampling_strategy} would tear KTO's batches apart; rows are "
            "shuffled beforehand: leave it out"
        )


KTO = Method(
    config=KTOConfig,
    make_trainer=_make_trainer,
    describe=lambda config: {"loss": config.loss_type},
    check=_check,
    in_order=True,
)
