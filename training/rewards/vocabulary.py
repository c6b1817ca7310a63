"""Reward models with a vocabulary head: one forward gives the reward of every next token (FaRMA's kind)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from trl.trainer.reward_trainer import RewardTrainer

from steersman.guidance.checkpoints import declared_kind
from steersman.training.accuracy import score_last_tokens
from steersman.training.configuration import ConfigError, load
from steersman.training.lora import without_wrapper
from steersman.training.rewards.arguments import RewardArguments
from steersman.training.rewards.causal import NO_POSITION, PARTIAL_LOSS, PrefixRewardTrainer, make_prefix_trainer
from steersman.training.rewards.recipe import Loaded, Recipe


class VocabularyRewardTrainer(PrefixRewardTrainer):
    """Trains on prefixes, for a causal language model whose logit of a token is the reward of the prefix it ends."""

    def _score(self, model: nn.Module, inputs: dict[str, Any], positions: Tensor) -> tuple[Tensor, Any]:
        logits = self._logits(model, inputs, positions)
        scores = logits.gather(2, tokens_at_positions(inputs, positions)).squeeze(-1)
        return scores, self._note(scores, inputs, positions)

    def _logits(self, model: nn.Module, inputs: dict[str, Any], positions: Tensor) -> Tensor:
        return next_token_logits(model, without_wrapper(self.accelerator.unwrap_model(model)), inputs, positions)

    def _note(self, scores: Tensor, inputs: dict[str, Any], positions: Tensor) -> Any:
        """TRL's metrics, of the rewards [2B, P] of the prefixes that end at the positions; what they are of."""
        longest = (positions != NO_POSITION).sum(dim=1, keepdim=True) - 1
        ends = SimpleNamespace(logits=scores.detach().gather(1, longest))
        _, outputs = RewardTrainer.compute_loss(self, lambda **_: ends, inputs, return_outputs=True)
        return outputs


def tokens_at_positions(inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """The tokens that stand at `positions` [N, P]: [N, P, 1]."""
    return inputs["input_ids"].gather(1, positions.clamp(min=1)).unsqueeze(-1)


def next_token_logits(model: nn.Module, unwrapped: nn.Module, inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """The logits of all tokens that could stand at `positions` [N, P], as the forward before them has them: [N, P, V].

    Only the hidden states before those tokens go through the head: a row has thousands of logits for each of them.
    unwrapped: the model itself, whose head is looked at; `model` may be what distributes it.
    """
    before = positions.clamp(min=1) - 1

    def select(_head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (hidden,) = args
        return (hidden.gather(1, before.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])),)

    handle = unwrapped.get_output_embeddings().register_forward_pre_hook(select)
    try:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        handle.remove()


def load_vocabulary_head(arguments: RewardArguments) -> Loaded:
    """A causal language model, in float32, whose head is its own and begins with no opinion: rewards are no logits.

    The head of a model that was trained as one is kept.
    """
    model, tokenizer = load(arguments.model, AutoModelForCausalLM)
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"{arguments.model}: the tokenizer needs a padding token")
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
