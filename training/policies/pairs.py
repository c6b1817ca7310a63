"""Methods of TRL's DPOTrainer, over rows of token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from steersman.training.data.preferences import TokenizedPreference
from steersman.training.options import refuse
from steersman.training.policies.method import Method

COLUMNS: tuple[str, ...] = ("chosen_segments", "rejected_segments")
"""Beyond TRL's: what our collators read."""


class TokenizedDPOTrainer(DPOTrainer):
    """TRL's trainer over rows of token ids; its own preparation takes text only and ends every response."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        """The columns of the dataset that are kept: those the collators read, and the one that rows are grouped by."""
        super()._set_signature_columns_if_needed()
        for name in (self.args.length_column_name, *COLUMNS):
            if name not in self._signature_columns:
                self._signature_columns.append(name)


def paired(rows: Sequence[TokenizedPreference]) -> Dataset:
    """Rows with the columns of TRL's collator, and their segments; `length` is what `train_sampling_strategy:
    group_by_length` reads."""
    examples = []
    for row in rows:
        segments = {name: getattr(row, name) for name in COLUMNS}
        examples.append(
            {
                "prompt_ids": row.prompt,
                "chosen_ids": row.chosen,
                "rejected_ids": row.rejected,
                "length": len(row.prompt) + row.longer,
                **{name: asdict(value) for name, value in segments.items() if value is not None},
            }
        )
    return Dataset.from_list(examples)


def train_with(trainer: type[TokenizedDPOTrainer]) -> Callable[..., TokenizedDPOTrainer]:
    """A method's `make_trainer`."""

    def make_trainer(
        config: DPOConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[TokenizedPreference],
        lora: LoraConfig | None,
    ) -> TokenizedDPOTrainer:
        return trainer(model, args=config, train_dataset=paired(rows), processing_class=tokenizer, peft_config=lora)

    return make_trainer


def _describe(config: DPOConfig) -> dict[str, Any]:
    facts: dict[str, Any] = {"loss": " + ".join(config.loss_type)}
    return facts | ({"loss_weights": config.loss_weights} if config.loss_weights else {})


def _check(config: DPOConfig) -> None:
    """Raises ConfigError for options of a loss that is not trained."""
    losses = set(config.loss_type)
    if not losses & {"robust", "exo_pair"}:
        refuse(
            config, {"label_smoothing": "loss_type robust or exo_pair takes it: choose one of them, or leave it out"}
        )
    if "discopop" not in losses:
        refuse(config, {"discopop_tau": "it belongs to loss_type discopop: leave it out"})
    if config.f_divergence_type != "alpha_divergence":
        refuse(config, {"f_alpha_divergence_coef": "it belongs to f_divergence_type alpha_divergence: leave it out"})


DPO = Method(config=DPOConfig, make_trainer=train_with(TokenizedDPOTrainer), describe=_describe, check=_check)
