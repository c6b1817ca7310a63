"""TRL's reward trainer with what it lacks: noisy labels, many prefixes from one causal forward, vocabulary heads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
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


class PairRewardTrainer(RewardTrainer):
    """Trains on the ends of two sequences, with labels of which a share `label_smoothing` is taken to be wrong."""

    label_smoothing = 0.0

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # TRL's own loss is computed beside ours: its metrics are what it logs.
        _, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = self._loss(*outputs.logits.squeeze(-1).chunk(2))
        return (loss, outputs) if return_outputs else loss

    def _loss(self, chosen: Tensor, rejected: Tensor, mask: Tensor | None = None) -> Tensor:
        loss = bradley_terry(chosen, rejected, mask, label_smoothing=self.label_smoothing)
        if self.args.center_rewards_coefficient is not None:
            sums = (chosen + rejected).square()
            kept = sums if mask is None else sums.masked_select(mask)
            loss = loss + self.args.center_rewards_coefficient * kept.mean()
        return loss


class PrefixRewardTrainer(PairRewardTrainer):
    """Trains on every position of a pair at once: L = −mean over pairs and prefixes of log σ(r_chosen − r_rejected)."""

    def _set_signature_columns_if_needed(self) -> None:
        """The columns of the dataset that reach the collator."""
        self._signature_columns = ["chosen_ids", "rejected_ids", *POSITION_COLUMNS]

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
            _, outputs = RewardTrainer.compute_loss(self, model, inputs, return_outputs=True)
        return at_positions(scores[0], positions), outputs


class VocabularyRewardTrainer(PrefixRewardTrainer):
    """The same for a causal language model whose logit of a token is the reward of the prefix that ends with it."""

    def _score(self, model: nn.Module, inputs: dict[str, Any], positions: Tensor) -> tuple[Tensor, Any]:
        scores = next_token_scores(model, self.accelerator.unwrap_model(model), inputs, positions)
        longest = (positions != NO_POSITION).sum(dim=1, keepdim=True) - 1
        ends = SimpleNamespace(logits=scores.detach().gather(1, longest))
        _, outputs = RewardTrainer.compute_loss(self, lambda **_: ends, inputs, return_outputs=True)
        return scores, outputs


def next_token_scores(model: nn.Module, unwrapped: nn.Module, inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """The logit of each token at `positions` [N, P], as the forward before it has it: [N, P].

    Only the hidden states before those tokens go through the head: a row has thousands of logits for each of them.
    unwrapped: the model itself, whose head is looked at; `model` may be what distributes it.
    """
    at = positions.clamp(min=1)

    def select(_head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (hidden,) = args
        return (hidden.gather(1, (at - 1).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])),)

    handle = unwrapped.get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    finally:
        handle.remove()
    return logits.gather(2, inputs["input_ids"].gather(1, at).unsqueeze(-1)).squeeze(-1)
