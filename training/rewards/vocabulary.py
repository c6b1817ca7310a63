"""Reward models with a vocabulary head: one forward gives the reward of every next token (FaRMA's kind)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from trl.trainer.reward_trainer import RewardTrainer

from steersman.training.accuracy import score_last_tokens
from steersman.training.configuration import ConfigError, load
from steersman.training.rewards.arguments import RewardArguments
from steersman.training.rewards.causal import NO_POSITION, PARTIAL_LOSS, PrefixRewardTrainer, make_prefix_trainer
from steersman.training.rewards.recipe import Loaded, Recipe


class VocabularyRewardTrainer(PrefixRewardTrainer):
    """Trains on prefixes, for a causal language model whose logit of a token is the reward of the prefix it ends."""

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


def _load(arguments: RewardArguments) -> Loaded:
    """A causal language model, in float32, whose head is its own and begins with no opinion: rewards are no logits."""
    model, tokenizer = load(arguments.model, AutoModelForCausalLM)
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"{arguments.model}: the tokenizer needs a padding token")
    model.config.get_text_config().tie_word_embeddings = False
    model.config.num_labels = 1  # what TRL takes for a reward model
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.zeros_like(head.weight))
    return model, tokenizer


VOCABULARY = Recipe(
    seen="prefixes of responses, with one output for every next token",
    describe=lambda arguments: {
        "loss": PARTIAL_LOSS,
        "prefixes": "causal",
        "prefixes_per_pair": arguments.prefixes_per_pair,
    },
    make_trainer=lambda *given: make_prefix_trainer(VocabularyRewardTrainer, *given),
    load=_load,
    score=score_last_tokens,
    kind="vocabulary",
)
