"""TRL's DPO trainer over rows of token ids, and with the token-level loss that it lacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_trainer import DPOTrainer

from steersman.training.preference_losses import sequential_kl, token_level_dpo


class TokenizedDPOTrainer(DPOTrainer):
    """TRL's trainer over rows of token ids; its own preparation takes text only and ends every response."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        """The columns of the dataset that are kept: those the collator reads, and the one that rows are grouped by."""
        super()._set_signature_columns_if_needed()
        if self.args.length_column_name not in self._signature_columns:
            self._signature_columns.append(self.args.length_column_name)


class TokenLevelDPOTrainer(TokenizedDPOTrainer):
    """TDPO: the sequential KL of both responses beside their log-ratios, for which whole distributions are needed."""

    version: Literal[1, 2] = 2
    alpha = 0.5

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        mask = inputs["completion_mask"][:, 1:].bool()
        tokens = inputs["input_ids"][:, 1:].unsqueeze(-1)
        fed = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        outputs = model(**fed)
        policy = outputs.logits[:, :-1]
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, self._reference() as reference_model:
            reference = reference_model(**fed).logits[:, :-1]
        ratios = _logprobs(policy, tokens) - _logprobs(reference, tokens)
        ratio = torch.where(mask, ratios, 0.0).sum(dim=1)
        kl = sequential_kl(reference, policy, mask)
        (chosen, rejected), (chosen_kl, rejected_kl) = ratio.chunk(2), kl.chunk(2)
        loss = token_level_dpo(chosen, rejected, chosen_kl, rejected_kl, self.beta, self.alpha, self.version)
        self._note(ratio.detach(), kl.detach())
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


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(dim=-1).gather(2, tokens).squeeze(-1)
