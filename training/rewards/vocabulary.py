"""Reward models with a vocabulary head: one forward gives the reward of every next token (FaRMA's kind)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from steersman.guidance.checkpoints import declared_kind
from steersman.training.accuracy import score_last_tokens
from steersman.training.configuration import load
from steersman.training.outputs import token_logits
from steersman.training.rewards.arguments import RewardArguments
from steersman.training.rewards.causal import PARTIAL_LOSS, PrefixRewardTrainer, make_prefix_trainer
from steersman.training.rewards.recipe import Loaded, Recipe


class VocabularyRewardTrainer(PrefixRewardTrainer):
    """Trains on prefixes, for a causal language model whose logit of a token is the reward of the prefix it ends."""

    def _score(self, model: nn.Module, inputs: dict[str, Any], positions: Tensor) -> tuple[Tensor, Any]:
        scores = self._logits(model, inputs, positions, tokens_at_positions(inputs, positions)).squeeze(-1)
        return scores, self._note_longest(scores, inputs, positions)

    def _logits(self, model: nn.Module, inputs: dict[str, Any], positions: Tensor, tokens: Tensor) -> Tensor:
        return token_logits(model, self.accelerator.unwrap_model(model), inputs, positions, tokens)


def tokens_at_positions(inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """The tokens that stand at `positions` [N, P]: [N, P, 1]."""
    return inputs["input_ids"].gather(1, positions.clamp(min=1)).unsqueeze(-1)


def load_vocabulary_head(arguments: RewardArguments) -> Loaded:
    """A causal language model, in float32, whose head is its own and begins with no opinion: rewards are no logits.

    The head of a model that was trained as one is kept.
    """
    model, tokenizer = load(arguments.model, AutoModelForCausalLM)
    model.config.num_labels = 1  # what TRL takes for a reward model
    if declared_kind(model.config) == "vocabulary":
        return model, tokenizer
    model.config.get_text_config().tie_word_embeddings = False
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
    load=load_vocabulary_head,
    score=score_last_tokens,
    kind="vocabulary",
)
