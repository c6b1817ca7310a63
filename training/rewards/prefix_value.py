"""Controlled Decoding's prefix scorer: what reward an answer of the policy that begins so will come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.utils import pad

from steersman.guidance.auxiliary import Unscorable
from steersman.guidance.checkpoints import ModelRefused, is_causal
from steersman.guidance.reward_loading import load_scorer
from steersman.training.configuration import ConfigError, one_line
from steersman.training.outputs import token_scores
from steersman.training.rewards.arguments import RewardArguments
from steersman.training.rewards.losses import regression
from steersman.training.rewards.recipe import Recipe, load_beside, window_of
from steersman.training.rewards.rollouts import TokenizedRollout, load_rollouts, make_rollouts, name_rollouts


@dataclass
class RolloutCollator:
    """`input_ids` and `attention_mask` [N, T], padded on the right; `response` [N, T] bool, True at the response's
    tokens; `rewards` [N] float32."""

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [torch.tensor(example["input_ids"]) for example in examples]
        rows = {
            "attention_mask": [torch.ones_like(row) for row in ids],
            "response": [torch.arange(len(row)) >= e["prompt"] for row, e in zip(ids, examples, strict=True)],
        }
        multiple = self.pad_to_multiple_of
        batch = {name: pad(tensors, 0, "right", multiple) for name, tensors in rows.items()}
        rewards = torch.tensor([float(example["reward"]) for example in examples])
        return {"input_ids": pad(ids, self.pad_token_id, "right", multiple), "rewards": rewards, **batch}


class PrefixValueTrainer(RewardTrainer):
    """Trains every prefix of an answer towards the answer's reward: L = mean over answers and tokens of (V − r)²
    (Controlled Decoding, equation 5: CD-FUDGE)."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        """The columns of the dataset that reach the collator."""
        self._signature_columns = ["input_ids", "prompt", "reward"]

    def count_terms(self, batch: dict[str, Any]) -> Tensor:
        """The tokens of all answers."""
        return batch["response"].sum()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        response, rewards = inputs.pop("response"), inputs.pop("rewards")
        with token_scores(self.accelerator.unwrap_model(model)) as scores:
            outputs = model(**inputs, use_cache=False)
        values = scores[0].squeeze(-1)
        loss = regression(values, rewards.unsqueeze(1).expand_as(values), response)
        metrics = self._metrics["train" if self.model.training else "eval"]
        last = inputs["attention_mask"].sum(dim=1, keepdim=True) - 1
        ends = self.accelerator.gather_for_metrics(regression(values.detach().gather(1, last)[:, 0], rewards))
        metrics["error_at_end"].append(ends.mean().item())
        return (loss, outputs) if return_outputs else loss


def _read(
    arguments: RewardArguments, config: RewardConfig, tokenizer: PreTrainedTokenizerBase
) -> list[TokenizedRollout]:
    """The rollouts of `train_file`, or those that are made of its prompts first."""
    window = window_of(config, tokenizer)
    if arguments.policy is None:
        return load_rollouts(arguments.train_file, tokenizer, window)
    batch, seed = config.per_device_eval_batch_size, config.seed
    made_of = (arguments.train_file, arguments.policy, arguments.teacher, window, batch, seed)
    path = name_rollouts(config.output_dir, *made_of)
    with config.main_process_first(local=False):
        # Other processes find a file that is whole, of which they keep everything.
        policy = load_beside(arguments.policy, AutoModelForCausalLM, tokenizer, dtype="auto").to(config.device)
        try:
            teacher = load_scorer("teacher", str(arguments.teacher), tokenizer, device=config.device)
            make_rollouts(path, arguments.train_file, policy, teacher, tokenizer, window=window, batch=batch, seed=seed)
        except (ModelRefused, Unscorable) as error:
            raise one_line(error) from None
    return load_rollouts(path, tokenizer, window)


def _make_trainer(
    arguments: RewardArguments,
    config: RewardConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedRollout],
) -> PrefixValueTrainer:
    if not is_causal(model.config):
        raise ConfigError(f"objective prefix_value needs a causal model, {arguments.model} is not")
    dataset = Dataset.from_list(
        [{"input_ids": row.prompt + row.response, "prompt": len(row.prompt), "reward": row.reward} for row in rows]
    )
    collator = RolloutCollator(tokenizer.pad_token_id, config.pad_to_multiple_of)
    return PrefixValueTrainer(model, config, collator, dataset, processing_class=tokenizer)


PREFIX_VALUE = Recipe(
    seen="every prefix of answers and the rewards that they came to",
    describe=lambda arguments: (
        {"loss": "squared error of the answer's reward at every prefix (CD-FUDGE)"}
        | {name: Path(path).name for name in ("policy", "teacher") if (path := getattr(arguments, name))}
    ),
    make_trainer=_make_trainer,
    read=_read,
    rows="rollouts",
)
