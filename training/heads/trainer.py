"""Training of a head on stored features, by transformers' Trainer: optimiser, schedule, logging and reports are its.

A head is trained in minutes and its steps are cheap, so no checkpoints are written on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from steersman.training.configuration import log
from steersman.training.heads.examples import Batch, Collator, Example
from steersman.training.heads.features import Features
from steersman.training.heads.network import TrainedHead


class Loss(Protocol):
    """What a head is trained by."""

    def __call__(self, head: TrainedHead, batch: Batch) -> Tensor:
        """The mean over a batch's terms."""
        ...

    def count(self, batch: Batch) -> Tensor:
        """Over how many terms, int64: places or rows."""
        ...


class HeadTrainer(Trainer):
    """Trains a head, and ends with its state behind the epoch that had the least loss on held-out rows."""

    def __init__(
        self,
        head: TrainedHead,
        config: TrainingArguments,
        loss: Loss,
        data: tuple[Features, Sequence[Example]],
        held_out: tuple[Features, Sequence[Example]] | None,
    ) -> None:
        """data, held_out: features and the rows that refer to them."""
        config._n_gpu = min(1, config.n_gpu)  # DataParallel would divide places among devices, tearing rows apart
        features, examples = data
        super().__init__(head, config, Collator(features), _Rows(examples))
        self._loss = loss
        self._held_out = held_out
        self.history: list[float] = []
        """Loss on held-out rows behind each epoch, if there are any."""
        self.model_accepts_loss_kwargs = False
        if held_out is not None:
            self.add_callback(_BestEpoch(self))

    def count_terms(self, batch: Batch) -> Tensor:
        """As `weighting.weigh_terms` needs them."""
        return self._loss.count(batch)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = self._loss(self.accelerator.unwrap_model(model), inputs)
        return (loss, {}) if return_outputs else loss

    def describe(self) -> dict[str, Any]:
        """Facts about the choice of the epoch; none without held-out rows."""
        if not self.history:
            return {}
        losses = [round(loss, 4) for loss in self.history]
        return {"best_epoch": 1 + self.history.index(min(self.history)), "validation_loss": losses}

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the terms of the held-out rows."""
        assert self._held_out is not None
        features, examples = self._held_out
        head = self.accelerator.unwrap_model(self.model)
        was_training = head.training
        head.eval()
        total, terms = 0.0, 0
        for batch in DataLoader(_Rows(examples), self.args.eval_batch_size, collate_fn=Collator(features)):
            own = {name: tensor.to(self.args.device) for name, tensor in batch.items()}
            count = int(self._loss.count(own))
            total, terms = total + count * float(self._loss(head, own)), terms + count
        head.train(was_training)
        return total / terms


class _Rows(torch.utils.data.Dataset[Example]):
    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


class _BestEpoch(TrainerCallback):
    """Keeps the weights of the epoch with the least loss on held-out rows."""

    def __init__(self, trainer: HeadTrainer) -> None:
        self._trainer = trainer
        self._best: dict[str, Tensor] = {}

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        history = self._trainer.history
        history.append(self._trainer.validate())
        log(f"epoch {len(history)}: loss on held-out rows {history[-1]:.4f}")
        if history[-1] == min(history):
            head = self._trainer.accelerator.unwrap_model(self._trainer.model)
            self._best = {name: tensor.detach().clone() for name, tensor in head.state_dict().items()}

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._best:
            self._trainer.accelerator.unwrap_model(self._trainer.model).load_state_dict(self._best)
