"""Losses that are means over as many terms as a batch happens to hold, such as prefixes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer


def weigh_terms(trainer: Trainer) -> None:
    """Makes the loss of a step the mean over all of its terms, however they fall among processes and among the batches
    of which gradients are accumulated. The mean of the batches' means, which is what Trainer takes, would count a term
    more the fewer its batch has.

    The trainer's `count_terms` says over how many terms the loss of a batch is the mean, or what is proportional to it:
    an int64 scalar. The loss is multiplied by that number over the mean number of the step's batches.
    """
    draw, compute = trainer.get_batch_samples, trainer.compute_loss

    def draw_and_count(batches: Iterator[Any], count: int, device: torch.device) -> tuple[list[Any], Tensor]:
        drawn, _ = draw(batches, count, device)
        terms = sum((trainer.count_terms(batch) for batch in drawn), torch.tensor(0)).to(device)
        return drawn, trainer.accelerator.reduce(terms, "sum")

    def compute_weighted(
        model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if num_items_in_batch is None:  # an evaluation
            return compute(model, inputs, return_outputs)
        batches = trainer.accelerator.num_processes * trainer.current_gradient_accumulation_steps
        weight = trainer.count_terms(inputs) * batches / num_items_in_batch
        loss, outputs = compute(model, inputs, return_outputs=True)
        return (weight * loss, outputs) if return_outputs else weight * loss

    trainer.get_batch_samples, trainer.compute_loss = draw_and_count, compute_weighted
