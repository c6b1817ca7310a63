"""Low-rank adapters for reward models: trained beside frozen weights, and part of them when the model is saved."""

from __future__ import annotations

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel


def lora_config(rank: int, task: str, trained_whole: list[str] | None = None) -> LoraConfig:
    """LoRA on all linear layers; an alpha of the rank scales it by one, so that the learning rate alone says how far it
    goes. task: PEFT's name of it; trained_whole: modules whose own weights are trained."""
    return LoraConfig(
        r=rank, lora_alpha=rank, target_modules="all-linear", task_type=task, modules_to_save=trained_whole
    )


def add_lora(model: PreTrainedModel, rank: int) -> PreTrainedModel | PeftModel:
    """The model with an adapter of this rank, all but it and the output head frozen; the model itself for rank 0."""
    if not rank:
        return model
    head = model.get_output_embeddings()
    if head is None:
        return get_peft_model(model, lora_config(rank, "SEQ_CLS"))  # PEFT trains a classifier's head by itself
    name = next(name for name, module in model.named_modules() if module is head)
    return get_peft_model(model, lora_config(rank, "CAUSAL_LM", [name]))


def merge_lora(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The plain model with the adapter in its weights: what the server loads knows nothing of adapters."""
    return model.merge_and_unload().requires_grad_(True) if isinstance(model, PeftModel) else model


def without_wrapper(model: nn.Module) -> PreTrainedModel:
    """The model inside of PEFT's, adapter included."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
