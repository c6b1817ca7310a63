"""The way every trainer runs: it continues exactly where it was interrupted, and stops where a number is lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.data_loader import SeedableRandomSampler
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import LengthGroupedSampler

from steersman.training.errors import ConfigError
from steersman.training.output import remove_later
from steersman.training.weighting import weigh_terms


def train(trainer: Trainer) -> Any:
    """Trains, from the checkpoint that `resume_from_checkpoint` names if there is one.

    Returns the trained model, whole, on the process that measures and writes it, and None on every other. Raises
    ConfigError if the loss or a weight becomes NaN or infinite, before such a weight is written.
    """
    if is_deepspeed_zero3_enabled() or (trainer.is_fsdp_enabled and hasattr(trainer.model, "peft_config")):
        raise ConfigError(
            "DeepSpeed ZeRO-3, and an adapter with FSDP, are not supported: FSDP trains all weights of a large model"
        )
    trainer.create_model_card = _write_nothing  # TRL's own, over the card of a model that may be there
    if hasattr(trainer, "count_terms"):
        weigh_terms(trainer)
    trainer.training_step = _checked(trainer)
    trainer.add_callback(_Continuity(trainer))
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    _require_finite_weights(trainer)
    return _whole_model(trainer)


def _write_nothing(*_: Any, **__: Any) -> None:
    """In place of a model card."""


def _whole_model(trainer: Trainer) -> PreTrainedModel | None:
    if trainer.is_fsdp_enabled:
        return gather(trainer)
    return trainer.accelerator.unwrap_model(trainer.model) if trainer.is_world_process_zero() else None


def gather(trainer: Trainer) -> PreTrainedModel | None:
    """Of a model of which every process holds a shard: written to files by all, and read from them by the first."""
    folder = Path(trainer.args.output_dir) / "gathered"
    trainer.save_model(str(folder))
    if not trainer.is_world_process_zero():
        return None
    (kind,) = AutoConfig.from_pretrained(folder).architectures
    model = getattr(transformers, kind).from_pretrained(folder, dtype="float32").to(trainer.args.device)
    shutil.rmtree(folder)
    return model


def _checked(trainer: Trainer) -> Any:
    """The trainer's step, which stops all processes where the loss of one of them is not finite."""
    step = trainer.training_step

    def checked(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = step(*args, **kwargs)
        losses = _of_all(trainer, loss)
        if not losses.isfinite().all():
            raise ConfigError(_diagnose(trainer, losses[~losses.isfinite()][0].item()))
        return loss

    return checked


def _of_all(trainer: Trainer, value: torch.Tensor) -> torch.Tensor:
    """A scalar's values in all processes, so that all of them find the same."""
    values = value.to(trainer.args.device).reshape(1)
    return trainer.accelerator.gather(values) if trainer.args.world_size > 1 else values


def _diagnose(trainer: Trainer, loss: float) -> str:
    step = trainer.state.global_step + 1
    bad = _not_finite(trainer.model)
    if step == 1 and bad is not None:
        return f"the model to start from has a weight that is not finite, in {bad}: start from another one"
    return (
        f"the loss of step {step} is {loss:g}, and training stops: try a learning_rate below "
        f"{trainer.args.learning_rate:g}, more warmup_steps or a max_grad_norm below {trainer.args.max_grad_norm:g}"
    )


def _require_finite_weights(trainer: Trainer) -> None:
    bad = _not_finite(trainer.model)
    if _of_all(trainer, torch.tensor(bad is not None)).any():
        raise ConfigError(
            f"step {trainer.state.global_step} left a weight that is not finite{f', in {bad}' if bad else ''}, and "
            f"training stops: try a learning_rate below {trainer.args.learning_rate:g}"
        )


def _not_finite(model: nn.Module) -> str | None:
    """The name of a parameter of which this process holds a NaN or an infinity."""
    for name, weight in model.named_parameters():
        held = weight.to_local() if isinstance(weight, DTensor) else weight
        if not held.isfinite().all():
            return name
    return None


class _Continuity(TrainerCallback):
    """Holds a run to what an uninterrupted one does: rows in their epoch's order, no checkpoints of another run."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.process_index == 0:
            remove_later(Path(args.output_dir), state.global_step)
        self.trainer.accelerator.wait_for_everyone()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, train_dataloader: Any, **_: Any
    ) -> None:
        """Every order is drawn from seed and epoch alone.

        Left to itself, a run of several processes that is continued within a later epoch has the first one's order, and
        rows that are grouped by length have whichever the global random state gives, in groups of one process's batch.
        """
        epoch, sampler = int(state.epoch or 0), _sampler(train_dataloader)
        if isinstance(sampler, SeedableRandomSampler):
            sampler.set_epoch(epoch)
        elif isinstance(sampler, LengthGroupedSampler):
            sampler.generator = torch.Generator().manual_seed(args.seed + epoch)
            sampler.batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A step's loss is known before its update, so that what the update did is looked at before it is saved."""
        if control.should_save:
            _require_finite_weights(self.trainer)

    on_epoch_end = on_step_end


def _sampler(loader: DataLoader) -> Any:
    """What draws the rows, below the samplers that make batches of them and share those out."""
    batches: Any = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return batches.sampler
