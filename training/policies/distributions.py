"""What the losses that TRL lacks have in common: both models' whole distributions, and an SFT loss beside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_config import DPOConfig

from steersman.training.configuration import ConfigError
from steersman.training.options import refuse
from steersman.training.policies.losses import sequential_kl
from steersman.training.policies.pairs import TokenizedDPOTrainer

_OF_TRL = (
    *("loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "label_smoothing"),
    *("use_weighting", "discopop_tau", "router_aux_loss_coef"),
)


@dataclass
class DistributionConfig(DPOConfig):
    """TRL's, without its choice among losses."""

    sft_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the SFT loss beside, −log π of the chosen responses' tokens on average."},
    )


class DistributionDPOTrainer(TokenizedDPOTrainer):
    """A loss from the log-ratio of every token and the sequential KL, both logged beside TRL's own metrics."""

    trains_kl = False
    """Whether the sequential KL takes part in the loss."""

    def _preference_loss(self, ratios: Tensor, kl: Tensor, inputs: dict[str, Any]) -> Tensor:
        """ratios: [2B, T - 1], log π/π_ref of the tokens from the second on, 0 outside responses; kl: [2B], nats. The
        chosen responses come first."""
        raise NotImplementedError

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        mask = inputs["completion_mask"][:, 1:].bool()
        tokens = inputs["input_ids"][:, 1:].unsqueeze(-1)
        fed = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        outputs = model(**fed)
        policy = outputs.logits[:, :-1]
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, self._reference() as reference_model:
            reference = reference_model(**fed).logits[:, :-1]
        logprobs = _logprobs(policy, tokens)
        ratios = torch.where(mask, logprobs - _logprobs(reference, tokens), 0.0)
        kl = sequential_kl(reference, policy if self.trains_kl else policy.detach(), mask)
        loss = self._preference_loss(ratios, kl, inputs)
        if self.args.sft_weight:
            loss = loss - self.args.sft_weight * logprobs.chunk(2)[0][mask.chunk(2)[0]].mean()
        self._note(ratios.detach().sum(dim=1), kl.detach())
        return (loss, outputs) if return_outputs else loss

    @contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        """The model that training started from: a copy, or an adapter's base."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        with self.accelerator.unwrap_model(self.model).disable_adapter():
            yield self.model

    def _note(self, ratio: Tensor, kl: Tensor) -> None:
        """Under the names that TRL's own metrics have, and the sequential KL."""
        chosen, rejected = (self.beta * self.accelerator.gather(part) for part in ratio.chunk(2))
        chosen_kl, rejected_kl = (self.accelerator.gather(part) for part in kl.chunk(2))
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, values in {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            "sequential_kl/chosen": chosen_kl,
            "sequential_kl/rejected": rejected_kl,
        }.items():
            metrics[name].append(values.mean().item())


def check(config: DistributionConfig) -> None:
    """Raises ConfigError for what these trainers can't be run with."""
    refuse(config, dict.fromkeys(_OF_TRL, "it belongs to TRL's losses, method dpo: leave it out"))
    if config.loss_type != ["sigmoid"]:
        raise ConfigError("loss_type is TRL's choice among losses, for method dpo; this method has a loss of its own")
    if config.precompute_ref_log_probs:
        raise ConfigError(
            "precompute_ref_log_probs: this method reads the reference's whole distributions; leave it out"
        )
    if config.sft_weight < 0:
        raise ConfigError(f"sft_weight is at least 0, not {config.sft_weight:g}; 0 leaves the SFT loss out")


def describe(config: DistributionConfig, loss: str, **settings: Any) -> dict[str, Any]:
    """The facts of a loss and its settings."""
    return {"loss": loss, **settings} | ({"sft_weight": config.sft_weight} if config.sft_weight else {})


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(dim=-1).gather(2, tokens).squeeze(-1)
