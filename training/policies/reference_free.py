"""ORPO and SimPO: TRL's trainers without a reference model, over rows of token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from steersman.training.configuration import ConfigError
from steersman.training.data.preferences import TokenizedPreference
from steersman.training.policies.method import Method


@dataclass
class SimPOConfig(CPOConfig):
    """TRL's configuration of CPO as SimPO is: no SFT loss unless `cpo_alpha` weighs one, and β as in its paper (§4)."""

    loss_type: str = "simpo"
    cpo_alpha: float = 0.0
    beta: float = 2.0


class _TokenizedRows:
    """Keeps rows as they are; TRL's own `tokenize_row` takes text only and ends every response."""

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        return feature


class TokenizedSimPOTrainer(_TokenizedRows, CPOTrainer):
    """TRL's CPO trainer over rows of token ids."""


class TokenizedORPOTrainer(_TokenizedRows, ORPOTrainer):
    """TRL's ORPO trainer over rows of token ids."""


def labelled(rows: Sequence[TokenizedPreference]) -> Dataset:
    """Rows with the columns of TRL's collator for these trainers; `length` is what `train_sampling_strategy:
    group_by_length` reads."""
    examples = []
    for row in rows:
        example: dict[str, Any] = {"length": len(row.prompt) + row.longer}
        for side, response in (("chosen", row.chosen), ("rejected", row.rejected)):
            example[f"{side}_input_ids"] = row.prompt + response
            example[f"{side}_attention_mask"] = [1] * (len(row.prompt) + len(response))
            example[f"{side}_labels"] = [-100] * len(row.prompt) + response
        examples.append(example)
    return Dataset.from_list(examples)


def _train_with(trainer: type[CPOTrainer] | type[ORPOTrainer]) -> Callable[..., CPOTrainer | ORPOTrainer]:
    def make_trainer(
        config: CPOConfig | ORPOConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[TokenizedPreference],
        lora: LoraConfig | None,
    ) -> CPOTrainer | ORPOTrainer:
        config.remove_unused_columns = False  # as TRL's collator needs it
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # as TRL does for other methods: padding takes part in no loss
        return trainer(model, args=config, train_dataset=labelled(rows), processing_class=tokenizer, peft_config=lora)

    return make_trainer


def _check(config: SimPOConfig) -> None:
    if config.loss_type != "simpo":
        raise ConfigError(f"loss_type: method simpo has its own, not {config.loss_type}; method dpo has a choice")


def _describe(config: SimPOConfig) -> dict[str, Any]:
    facts = {"loss": "simpo", "simpo_gamma": config.simpo_gamma}
    return facts | ({"cpo_alpha": config.cpo_alpha} if config.cpo_alpha else {})


ORPO = Method(
    config=ORPOConfig,
    make_trainer=_train_with(TokenizedORPOTrainer),
    describe=lambda _: {"loss": "orpo"},
)
SIMPO = Method(config=SimPOConfig, make_trainer=_train_with(TokenizedSimPOTrainer), describe=_describe, check=_check)
