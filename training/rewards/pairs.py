"""Objectives that score two sequences of a pair, each row by itself: whole responses, their beginnings, prefixes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer

from steersman.training.data.preferences import TokenizedPreference
from steersman.training.outputs import end_scores
from steersman.training.prefixes import cut, draw_subset, truncate
from steersman.training.rewards.arguments import RewardArguments
from steersman.training.rewards.endings import ending_of, with_ending
from steersman.training.rewards.losses import bradley_terry
from steersman.training.rewards.recipe import Recipe

IDS = ("chosen_ids", "rejected_ids")
MakeRows = Callable[[RewardArguments, Sequence[TokenizedPreference], int], Dataset]


class PairRewardTrainer(RewardTrainer):
    """Trains on the ends of two sequences, with labels of which a share `label_smoothing` is taken to be wrong, and
    `strength` [B], where the batch has one, is how much each counts."""

    label_smoothing = 0.0
    columns: Sequence[str] = ()
    """What the collator reads of a row beside its ids."""

    def _set_signature_columns_if_needed(self) -> None:
        """The columns of the dataset that reach the collator."""
        self._signature_columns = [*IDS, *self.columns, self.args.length_column_name]

    def count_terms(self, batch: dict[str, Any]) -> Tensor:
        """Over how many terms the loss of a batch is the mean: here pairs."""
        return torch.tensor(len(batch["input_ids"]) // 2)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        numbers = {name: inputs.pop(name) for name in self.columns}
        unwrapped = self.accelerator.unwrap_model(model)
        scores = end_scores(model, unwrapped, inputs["input_ids"], inputs["attention_mask"])
        outputs = self._note(scores, inputs)
        loss = self._loss(*scores.squeeze(-1).chunk(2), **numbers)
        return (loss, outputs) if return_outputs else loss

    def _note(self, scores: Tensor, inputs: dict[str, Any]) -> Any:
        """TRL's metrics of rewards [2B, 1]; what they are of. They are logged by TRL's own loss, which is dropped."""
        given = SimpleNamespace(logits=scores.detach())
        _, outputs = RewardTrainer.compute_loss(self, lambda **_: given, inputs, return_outputs=True)
        return outputs

    def _loss(
        self, chosen: Tensor, rejected: Tensor, mask: Tensor | None = None, strength: Tensor | None = None
    ) -> Tensor:
        loss = bradley_terry(chosen, rejected, mask, strength=strength, label_smoothing=self.label_smoothing)
        if self.args.center_rewards_coefficient is not None:
            sums = (chosen + rejected).square()
            kept = sums if mask is None else sums.masked_select(mask)
            loss = loss + self.args.center_rewards_coefficient * kept.mean()
        return loss


@dataclass
class NumberCollator(DataCollatorForPreference):
    """Adds [B] float32 of each of `columns`."""

    columns: Sequence[str] = ()

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        return batch | {name: torch.tensor([float(example[name]) for example in examples]) for name in self.columns}


def whole_rows(rows: Sequence[TokenizedPreference]) -> Dataset:
    """Rows with the columns of TRL's collator."""
    return Dataset.from_list([whole_row(row) for row in rows])


def whole_row(row: TokenizedPreference) -> dict[str, Any]:
    """A pair's ids; `length` is what `train_sampling_strategy: group_by_length` reads."""
    ids = {"chosen_ids": row.prompt + row.chosen, "rejected_ids": row.prompt + row.rejected}
    return {**ids, "length": len(row.prompt) + row.longer}


def subset_rows(rows: Sequence[TokenizedPreference], ratio: float, seed: int) -> Dataset:
    """Each partial sequence of a random subset as a row of its own."""
    subset = draw_subset([row.longer for row in rows], ratio, seed)
    return whole_rows(
        [TokenizedPreference(rows[n].prompt, cut(rows[n].chosen, i), cut(rows[n].rejected, i)) for n, i in subset]
    )


def train_on(
    make_rows: MakeRows, trainer: type[PairRewardTrainer] = PairRewardTrainer, columns: Sequence[str] = ()
) -> Any:
    """A recipe's `make_trainer` over the rows that are made of the pairs, given the arguments and the seed.

    columns: numbers of the rows that the trainer's loss takes by name.
    """

    def make_trainer(
        arguments: RewardArguments,
        config: RewardConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[TokenizedPreference],
    ) -> PairRewardTrainer:
        dataset = make_rows(arguments, rows, config.seed)
        if ending := ending_of(model, tokenizer):
            dataset = dataset.map(lambda row: {name: with_ending(row[name], ending) for name in IDS})
        collator = NumberCollator(tokenizer.pad_token_id, config.pad_to_multiple_of, columns=columns)
        made = trainer(model, config, collator, dataset, processing_class=tokenizer)
        made.label_smoothing, made.columns = arguments.label_smoothing, columns
        return made

    return make_trainer


FULL = Recipe(
    seen="whole responses",
    describe=lambda _: {"loss": "Bradley-Terry on whole responses"},
    make_trainer=train_on(lambda _arguments, rows, _seed: whole_rows(rows)),
)
TRUNCATED = Recipe(
    seen="the beginnings of responses",
    describe=lambda arguments: {"loss": "Bradley-Terry on the beginnings of responses", "keep": arguments.kept},
    make_trainer=train_on(lambda arguments, rows, _seed: whole_rows(truncate(rows, arguments.kept))),
)
SUBSET = train_on(lambda arguments, rows, seed: subset_rows(rows, arguments.subset_ratio, seed))
