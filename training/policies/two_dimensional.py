"""2D-DPO: policies trained on segments that are scored by aspect; 1D-DPO: by one aspect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.dpo_trainer import DataCollatorForPreference

from steersman.training.aspects import PAPER, read_weights
from steersman.training.configuration import ConfigError
from steersman.training.data.preferences import TokenizedPreference
from steersman.training.data.segments import ASPECTS
from steersman.training.policies import distributions
from steersman.training.policies.distributions import DistributionConfig, DistributionDPOTrainer
from steersman.training.policies.losses import Segments, two_dimensional_dpo
from steersman.training.policies.method import Method
from steersman.training.policies.pairs import COLUMNS, paired

NO_SEGMENT = -1


@dataclass
class TwoDimensionalConfig(DistributionConfig):
    """TRL's, with 2D-DPO's own defaults."""

    beta: float = field(default=0.2, metadata={"help": "DPO's β, divided by the mean reward of a pair's segments."})
    sft_weight: float = field(
        default=0.1,
        metadata={"help": "Weight of the SFT loss beside, −log π of the chosen responses' tokens on average."},
    )
    weights: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Aspect → weight in a segment's reward. 2d: 2D-DPO's by default (helpfulness .3, correctness .4, "
            "safety, completeness and clarity .1 each); 1d: one aspect, helpfulness by default."
        },
    )


@dataclass
class SegmentCollator(DataCollatorForPreference):
    """Adds `segment_ids` [2B, T], NO_SEGMENT outside responses, `scores` [2B, S, A] and `segment_mask` [2B, S] of A
    aspects; the chosen responses come first."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        sides = [(len(example["prompt_ids"]), example[column]) for column in COLUMNS for example in examples]
        batch["segment_ids"] = torch.full_like(batch["input_ids"], NO_SEGMENT)
        for row, (prompt, segments) in enumerate(sides):
            start = 0
            for number, end in enumerate(segments["ends"]):
                batch["segment_ids"][row, prompt + start : prompt + end] = number
                start = end
        scores = [torch.tensor(segments["scores"]) for _, segments in sides]
        batch["scores"] = pad_sequence(scores, batch_first=True)
        counts = torch.tensor([len(own) for own in scores])
        batch["segment_mask"] = torch.arange(batch["scores"].shape[1]) < counts.unsqueeze(1)
        return batch


class TwoDimensionalTrainer(DistributionDPOTrainer):
    """The best segments of the chosen response against the worst of the rejected (`two_dimensional_dpo`)."""

    weights: tuple[float, ...] = tuple(PAPER.values())
    """Of the aspects, in the order of the rows' scores."""

    def _preference_loss(self, ratios: Tensor, kl: Tensor, inputs: dict[str, Any]) -> Tensor:
        """See DistributionDPOTrainer."""
        own = inputs["segment_ids"][:, 1:].clamp(min=0)  # ratios are 0 where there is no segment
        sums = ratios.new_zeros(inputs["segment_mask"].shape).scatter_add(1, own, ratios)
        sides = zip(sums.chunk(2), inputs["scores"].chunk(2), inputs["segment_mask"].chunk(2), strict=True)
        chosen, rejected = (Segments(*side) for side in sides)
        return two_dimensional_dpo(chosen, rejected, self.beta, self.weights)


def _make_method(loss: str, default: Mapping[str, float]) -> Method:
    def weights(config: TwoDimensionalConfig) -> dict[str, float]:
        return read_weights(config.weights, default)

    def make_trainer(
        config: TwoDimensionalConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[TokenizedPreference],
        lora: LoraConfig | None,
    ) -> TwoDimensionalTrainer:
        trainer = TwoDimensionalTrainer(
            model, args=config, train_dataset=paired(rows), processing_class=tokenizer, peft_config=lora
        )
        trainer.data_collator = SegmentCollator(**vars(trainer.data_collator))
        trainer.weights = tuple(weights(config).values())
        return trainer

    def check(config: TwoDimensionalConfig) -> None:
        distributions.check(config)
        if len(weights(config)) > 1 and len(default) == 1:
            raise ConfigError(
                f"weights: method 1d has one aspect, not {', '.join(weights(config))}; method 2d has more"
            )

    return Method(
        config=TwoDimensionalConfig,
        make_trainer=make_trainer,
        describe=lambda config: distributions.describe(config, loss, weights=weights(config)),
        check=check,
        aspects=lambda config: list(weights(config)),
    )


TWO_DIMENSIONAL = _make_method("2d", PAPER)
ONE_DIMENSIONAL = _make_method("1d", {ASPECTS[0]: 1.0})
