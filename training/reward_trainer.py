"""TRL's reward trainer with the scores of many prefixes read from one causal forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer

from steersman.training.objectives import bradley_terry

NO_POSITION = -1
# Of the sequence that is the prompt and the response: where each prefix ends, for chosen and rejected alike.
POSITION_COLUMNS = ("chosen_positions", "rejected_positions")


@contextmanager
def token_scores(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the scores at every token, [B, T, 1], that a causal classifier's forward pools only the last of.

    A hook on the score head rather than a call to the inner model: wrappers around the model keep seeing its forward.
    """
    scores: list[Tensor] = []
    handle = model.get_submodule("score").register_forward_hook(lambda _head, _inputs, output: scores.append(output))
    try:
        yield scores
    finally:
        handle.remove()


def at_positions(scores: Tensor, positions: Tensor) -> Tensor:
    """The scores at each row's positions. scores: [B, T, 1]; positions: [B, P] int64, NO_POSITION is padding."""
    return scores.squeeze(-1).gather(1, positions.clamp(min=0))


@dataclass
class PrefixCollator(DataCollatorForPreference):
    """Adds `positions` [2B, P]: where each prefix ends, the chosen responses first, padded with NO_POSITION."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        rows = [torch.tensor(example[column]) for column in POSITION_COLUMNS for example in examples]
        batch["positions"] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=NO_POSITION)
        return batch


class PrefixRewardTrainer(RewardTrainer):
    """Trains on every position of a pair at once: L = −mean over pairs and prefixes of log σ(r_chosen − r_rejected)."""

    def _set_signature_columns_if_needed(self) -> None:
        """The columns of the dataset that reach the collator."""
        self._signature_columns = ["chosen_ids", "rejected_ids", *POSITION_COLUMNS]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        positions = inputs.pop("positions")
        with token_scores(self.accelerator.unwrap_model(model)) as scores:
            # TRL's own loss on whole responses is computed beside ours: its metrics are what it logs.
            _, outputs = super().compute_loss(model, inputs, return_outputs=True)
        chosen, rejected = at_positions(scores[0], positions).chunk(2)
        mask = positions.chunk(2)[0] != NO_POSITION
        loss = bradley_terry(chosen, rejected, mask)
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * (chosen + rejected).masked_select(mask).square().mean()
        return (loss, outputs) if return_outputs else loss
