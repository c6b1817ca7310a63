"""A vocabulary head that learns from a reward model: one forward says what the teacher reads k candidates for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl.trainer.reward_config import RewardConfig

from steersman.guidance.checkpoints import is_causal
from steersman.training.accuracy import score_ends, score_last_tokens
from steersman.training.configuration import ConfigError
from steersman.training.data.preferences import TokenizedPreference
from steersman.training.outputs import likeliest_tokens, output_layer, token_scores
from steersman.training.rewards.arguments import RewardArguments
from steersman.training.rewards.causal import NO_POSITION, make_prefix_trainer
from steersman.training.rewards.losses import distillation, regression
from steersman.training.rewards.recipe import Recipe, load_beside
from steersman.training.rewards.vocabulary import (
    VocabularyRewardTrainer,
    load_vocabulary_head,
    tokens_at_positions,
)

LEVEL = 0.1
"""Weight of the candidates' mean reward: guidance needs differences alone, comparing whole answers the mean too."""


@torch.no_grad()
def branch_scores(teacher: PreTrainedModel, inputs: dict[str, Any], positions: Tensor, candidates: Tensor) -> Tensor:
    """Rewards [N, P, k] of each row's prefix before a position and, in the position's place, a candidate.

    One forward: behind the row stand its candidates, each in its position's place and seeing what is before it.
    inputs: `input_ids` [N, T] and `attention_mask`, padded on the right; positions: [N, P] of them, NO_POSITION is
    padding; candidates: [N, P, k] token ids.
    """
    ids = inputs["input_ids"]
    (rows, length), branches = ids.shape, candidates.flatten(1)
    fed = length + branches.shape[1]
    places = torch.arange(length, device=ids.device).expand(rows, length)
    ahead = positions.clamp(min=0).repeat_interleave(candidates.shape[-1], dim=1)
    at = torch.cat((places, ahead), dim=1)
    seen = places.unsqueeze(1) < at.unsqueeze(-1)  # [N, fed, T]: whose tokens stand before one's own place
    itself = torch.eye(fed, dtype=torch.bool, device=ids.device).expand(rows, fed, fed)
    visible = itself | nn.functional.pad(seen, (0, branches.shape[1]))
    mask = torch.where(visible, 0.0, torch.finfo(teacher.dtype).min).to(teacher.dtype).unsqueeze(1)
    # In its own precision: candidates differ by little.
    with token_scores(teacher) as scores, torch.autocast(ids.device.type, enabled=False):
        teacher(torch.cat((ids, branches), dim=1), attention_mask=mask, position_ids=at, use_cache=False)
    return scores[0][:, length:, 0].view(candidates.shape)


class DistilledRewardTrainer(VocabularyRewardTrainer):
    """Trains the logits of a prefix's candidates towards the teacher's rewards: of the policy's `top_k` likeliest
    tokens, which are what guidance will ask for, and of the response's own token."""

    teacher: PreTrainedModel
    policy: PreTrainedModel
    top_k: int

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        positions = inputs.pop("positions")
        candidates = self._candidates(model, inputs, positions)
        scores = self._logits(model, inputs, positions, candidates)
        taught = branch_scores(self.teacher.to(scores.device), inputs, positions, candidates)
        outputs = self._note_longest(scores[..., 0], inputs, positions)
        mask = positions != NO_POSITION
        loss = distillation(scores, taught, mask) + LEVEL * regression(scores.mean(-1), taught.mean(-1), mask)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _candidates(self, model: nn.Module, inputs: dict[str, Any], positions: Tensor) -> Tensor:
        """[N, P, 1 + k] token ids: the response's own, then the policy's likeliest."""
        policy = self.policy.to(positions.device)
        vocabulary = output_layer(self.accelerator.unwrap_model(model)).out_features
        likeliest = likeliest_tokens(policy, inputs, positions, self.top_k, vocabulary)
        return torch.cat((tokens_at_positions(inputs, positions), likeliest), dim=-1)


def _make_trainer(
    arguments: RewardArguments,
    config: RewardConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedPreference],
) -> DistilledRewardTrainer:
    trainer = make_prefix_trainer(DistilledRewardTrainer, arguments, config, model, tokenizer, rows)
    teacher, policy = str(arguments.teacher), str(arguments.policy)
    trainer.teacher = load_beside(teacher, AutoModelForSequenceClassification, tokenizer)
    trainer.policy = load_beside(policy, AutoModelForCausalLM, tokenizer, dtype="auto")
    trainer.top_k = arguments.top_k
    check_branches(trainer.teacher, max((row.prompt + row.chosen for row in rows), key=len), teacher)
    return trainer


def check_branches(teacher: PreTrainedModel, row: Sequence[int], path: str) -> None:
    """Raises ConfigError where candidates that branch off are scored otherwise than by plain forwards: some
    architectures make masks of their own, and a sliding window would be missing."""
    if not is_causal(teacher.config) or teacher.config.num_labels != 1:
        raise ConfigError(f"teacher: {path} is no causal reward model with one output")
    candidates = [row[0], row[-1]]
    inputs = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.int64)}
    found = branch_scores(teacher, inputs, torch.tensor([[len(row) - 1]]), torch.tensor([[candidates]]))[0, 0]
    plain = score_ends(teacher, [[*row[:-1], candidate] for candidate in candidates])
    if not torch.allclose(found, plain, atol=1e-3, rtol=1e-3):
        raise ConfigError(
            f"teacher: {path} ({teacher.config.model_type}) scores branches otherwise than whole prefixes, by "
            f"{(found - plain).abs().max():.2g}: train with objective vocabulary"
        )


DISTILLED = Recipe(
    seen="prefixes of responses, with one output for every next token, taught by another reward model",
    describe=lambda arguments: {
        "loss": "squared error of a teacher's rewards of the policy's likeliest tokens, within a prefix",
        "teacher": Path(str(arguments.teacher)).name,
        "policy": Path(str(arguments.policy)).name,
        "prefixes_per_pair": arguments.prefixes_per_pair,
        "top_k": arguments.top_k,
    },
    make_trainer=_make_trainer,
    load=load_vocabulary_head,
    score=score_last_tokens,
    kind="vocabulary",
)
