"""PARGS's objective: Bradley-Terry on prefixes of equal length, many of a pair read from one causal forward."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import DataCollatorForPreference

from steersman.guidance.checkpoints import is_causal
from steersman.training.configuration import ConfigError
from steersman.training.data.preferences import TokenizedPreference
from steersman.training.outputs import token_scores
from steersman.training.prefixes import draw_cuts
from steersman.training.rewards.arguments import RewardArguments
from steersman.training.rewards.pairs import SUBSET, PairRewardTrainer, whole_row
from steersman.training.rewards.recipe import Recipe

NO_POSITION = -1
# Of the sequence that is the prompt and the response: where each prefix ends, for chosen and rejected alike.
POSITION_COLUMNS = ("chosen_positions", "rejected_positions")


def at_positions(scores: Tensor, positions: Tensor) -> Tensor:
    """The scores at each row's positions, [B, P, C]. scores: [B, T, C]; positions: [B, P] int64, NO_POSITION is
    padding."""
    return scores.gather(1, positions.clamp(min=0).unsqueeze(-1).expand(-1, -1, scores.shape[-1]))


@dataclass
class PrefixCollator(DataCollatorForPreference):
    """Adds `positions` [2B, P]: where each prefix ends, the chosen responses first, padded with NO_POSITION."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        rows = [torch.tensor(example[column]) for column in POSITION_COLUMNS for example in examples]
        batch["positions"] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=NO_POSITION)
        return batch


class PrefixRewardTrainer(PairRewardTrainer):
    """Trains on every position of a pair at once: L = −mean over pairs and prefixes of log σ(r_chosen − r_rejected)."""

    columns = POSITION_COLUMNS

    def count_terms(self, batch: dict[str, Any]) -> Tensor:
        """The prefixes of all pairs, of which short ones have fewer."""
        return (batch["positions"].chunk(2)[0] != NO_POSITION).sum()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        positions = inputs.pop("positions")
        scores, outputs = self._score(model, inputs, positions)
        chosen, rejected = scores.chunk(2)
        loss = self._loss(chosen, rejected, positions.chunk(2)[0] != NO_POSITION)
        return (loss, outputs) if return_outputs else loss

    def _score(self, model: nn.Module, inputs: dict[str, Any], positions: Tensor) -> tuple[Tensor, Any]:
        """Rewards [2B, P] of the prefixes that end at the positions, and the outputs that TRL's metrics are of."""
        with token_scores(self.accelerator.unwrap_model(model)) as scores:
            model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        found = at_positions(scores[0], positions).squeeze(-1)
        return found, self._note_longest(found, inputs, positions)

    def _note_longest(self, scores: Tensor, inputs: dict[str, Any], positions: Tensor) -> Any:
        """TRL's metrics, of the rewards [2B, P] of each row's longest prefix; what they are of."""
        longest = (positions != NO_POSITION).sum(dim=1, keepdim=True) - 1
        return self._note(scores.gather(1, longest), inputs)


def causal_rows(rows: Sequence[TokenizedPreference], count: int, seed: int) -> Dataset:
    """Whole pairs, with the positions of their prefixes' last tokens."""
    rng = random.Random(seed)
    examples = []
    for row in rows:
        cuts = draw_cuts(row.longer, count, rng)
        examples.append(
            {
                **whole_row(row),
                "chosen_positions": [len(row.prompt) + min(i, len(row.chosen)) - 1 for i in cuts],
                "rejected_positions": [len(row.prompt) + min(i, len(row.rejected)) - 1 for i in cuts],
            }
        )
    return Dataset.from_list(examples)


def make_prefix_trainer(
    trainer: type[PrefixRewardTrainer],
    arguments: RewardArguments,
    config: RewardConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedPreference],
) -> PrefixRewardTrainer:
    """A trainer over `prefixes_per_pair` prefixes of every pair."""
    dataset = causal_rows(rows, arguments.prefixes_per_pair, config.seed)
    made = trainer(
        model,
        config,
        PrefixCollator(tokenizer.pad_token_id, config.pad_to_multiple_of),
        dataset,
        processing_class=tokenizer,
    )
    made.label_smoothing = arguments.label_smoothing
    return made


def _make_trainer(
    arguments: RewardArguments, config: RewardConfig, model: PreTrainedModel, *data: Any
) -> PairRewardTrainer:
    if arguments.prefixes == "subset":
        made: PairRewardTrainer = SUBSET(arguments, config, model, *data)
        return made
    if not is_causal(model.config):
        raise ConfigError(f"prefixes: causal needs a causal model, {arguments.model} is not: use subset")
    return make_prefix_trainer(PrefixRewardTrainer, arguments, config, model, *data)


def _describe(arguments: RewardArguments) -> dict[str, Any]:
    setting = "subset_ratio" if arguments.prefixes == "subset" else "prefixes_per_pair"
    return {"loss": PARTIAL_LOSS, "prefixes": arguments.prefixes, setting: getattr(arguments, setting)}


PARTIAL_LOSS = "Bradley-Terry on prefixes of equal length (PARGS, equation 4)"
PARTIAL = Recipe(seen="prefixes of responses", describe=_describe, make_trainer=_make_trainer)
