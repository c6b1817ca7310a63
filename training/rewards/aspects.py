"""2D-DPO's reward model: one output for every aspect, learned from scored segments by regression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.reward_config import RewardConfig

from steersman.training.aspects import read_weights
from steersman.training.configuration import ConfigError
from steersman.training.data.preferences import TokenizedPreference, load_preferences
from steersman.training.data.segments import SegmentedResponse
from steersman.training.outputs import token_scores
from steersman.training.rewards.arguments import RewardArguments
from steersman.training.rewards.causal import (
    NO_POSITION,
    POSITION_COLUMNS,
    PrefixCollator,
    PrefixRewardTrainer,
    at_positions,
)
from steersman.training.rewards.losses import regression
from steersman.training.rewards.pairs import whole_row
from steersman.training.rewards.recipe import Loaded, Recipe, load_classifier, window_of

RATING_COLUMNS = ("chosen_ratings", "rejected_ratings")


@dataclass
class AspectCollator(PrefixCollator):
    """Adds `ratings` [2B, P, A] of what ends at `positions`, the chosen responses first."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        rows = [torch.tensor(example[column]) for column in RATING_COLUMNS for example in examples]
        batch["ratings"] = pad_sequence(rows, batch_first=True)
        return batch


class AspectRewardTrainer(PrefixRewardTrainer):
    """L = mean over responses, positions and aspects of (score − rating)²; TRL's metrics are of a response's weighted
    scores, averaged over positions."""

    weights: tuple[float, ...] = ()

    def _set_signature_columns_if_needed(self) -> None:
        """The columns of the dataset that reach the collator."""
        super()._set_signature_columns_if_needed()
        self._signature_columns += RATING_COLUMNS

    def count_terms(self, batch: dict[str, Any]) -> Tensor:
        """The positions of all responses: a pair's two may have different numbers of segments."""
        return (batch["positions"] != NO_POSITION).sum()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        positions, ratings = inputs.pop("positions"), inputs.pop("ratings")
        scores = read_aspects(model, self.accelerator.unwrap_model(model), inputs, positions)
        there = positions != NO_POSITION
        weighted = torch.where(there, scores.detach().float() @ scores.new_tensor(self.weights).float(), 0.0)
        outputs = self._note((weighted.sum(dim=1) / there.sum(dim=1)).unsqueeze(-1), inputs)
        loss = regression(scores, ratings, there)
        return (loss, outputs) if return_outputs else loss


def read_aspects(model: nn.Module, unwrapped: nn.Module, inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """Scores [N, P, A] at positions [N, P].

    unwrapped: the model itself, whose head is looked at; `model` may be what distributes it.
    """
    with token_scores(unwrapped) as scores:
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    return at_positions(scores[0], positions)


@torch.inference_mode()
def score_segments(
    model: PreTrainedModel, responses: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]], batch: int = 32
) -> list[Tensor]:
    """Of responses, each with its prompt and its segments' ends: their segments' scores, [S, A] float32 on the CPU.

    responses: prompt ids, response ids, and where each segment ends, counted in tokens of the response.
    """
    was_training = model.training
    model.eval()
    scores: list[Tensor] = []
    for start in range(0, len(responses), batch):
        rows = responses[start : start + batch]
        ids = [torch.tensor([*prompt, *response]) for prompt, response, _ in rows]
        ends = [torch.tensor(ends) + len(prompt) - 1 for prompt, _, ends in rows]
        fed = {  # behind a causal model's other tokens, any token can stand in for padding
            "input_ids": pad_sequence(ids, batch_first=True).to(model.device),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(model.device),
        }
        positions = pad_sequence(ends, batch_first=True, padding_value=NO_POSITION).to(model.device)
        read = read_aspects(model, model, fed, positions).float().cpu()
        scores += [own[: len(row)] for own, row in zip(read, ends, strict=True)]
    model.train(was_training)
    return scores


def aspect_rows(rows: Sequence[TokenizedPreference], every_token: bool) -> Dataset:
    """Whole pairs with ratings: at each segment's last token, or at all of its tokens."""
    examples = []
    for row in rows:
        example = whole_row(row)
        sides = zip(POSITION_COLUMNS, RATING_COLUMNS, (row.chosen_segments, row.rejected_segments), strict=True)
        for positions, ratings, segments in sides:
            assert segments is not None
            rated = _rated(segments, every_token)
            example[positions] = [len(row.prompt) + token for token, _ in rated]
            example[ratings] = [scores for _, scores in rated]
        examples.append(example)
    return Dataset.from_list(examples)


def _rated(segments: SegmentedResponse, every_token: bool) -> list[tuple[int, list[float]]]:
    """Tokens of a response and their segments' scores."""
    starts = [0, *segments.ends[:-1]] if every_token else [end - 1 for end in segments.ends]
    spans = zip(starts, segments.ends, segments.scores, strict=True)
    return [(token, scores) for start, end, scores in spans for token in range(start, end)]


def _aspects(arguments: RewardArguments) -> list[str]:
    return list(read_weights(arguments.weights))


def _load(arguments: RewardArguments) -> Loaded:
    aspects = _aspects(arguments)
    model, tokenizer = load_classifier(arguments, len(aspects))
    if not hasattr(model, "score"):
        raise ConfigError(f"objective: aspects needs a causal model, {arguments.model} is not")
    return model, tokenizer


def _read(
    arguments: RewardArguments, config: RewardConfig, tokenizer: PreTrainedTokenizerBase
) -> list[TokenizedPreference]:
    window = window_of(config, tokenizer)
    return load_preferences(arguments.train_file, tokenizer, window, aspects=_aspects(arguments))


def _make_trainer(
    arguments: RewardArguments,
    config: RewardConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedPreference],
) -> AspectRewardTrainer:
    dataset = aspect_rows(rows, arguments.aspects_at == "tokens")
    model.config.num_labels = 1  # what TRL takes for a reward model
    collator = AspectCollator(tokenizer.pad_token_id, config.pad_to_multiple_of)
    trainer = AspectRewardTrainer(model, config, collator, dataset, processing_class=tokenizer)
    model.config.id2label = dict(enumerate(_aspects(arguments)))
    model.config.label2id = {aspect: number for number, aspect in model.config.id2label.items()}
    trainer.weights = tuple(read_weights(arguments.weights).values())
    return trainer


def _describe(arguments: RewardArguments) -> dict[str, Any]:
    weights = read_weights(arguments.weights)
    return {
        "loss": "squared error of the aspects' scores, 0 to 4, at "
        + ("each segment's last token (2D-DPO)" if arguments.aspects_at == "segments" else "every token of a segment"),
        "aspects": list(weights),
        "weights": list(weights.values()),
        "aspects_at": arguments.aspects_at,
    }


def _measure(model: PreTrainedModel, rows: Sequence[TokenizedPreference]) -> dict[str, Any]:
    """Of held-out segments: each aspect's root mean squared error, and beside it the ratings' deviation."""
    both = [
        (row.prompt, response, segments)
        for row in rows
        for response, segments in ((row.chosen, row.chosen_segments), (row.rejected, row.rejected_segments))
        if segments is not None
    ]
    scores = torch.cat(score_segments(model, [(prompt, ids, segments.ends) for prompt, ids, segments in both]))
    ratings = torch.tensor([line for _, _, segments in both for line in segments.scores])
    found = {
        "error": (scores - ratings).square().mean(dim=0).sqrt(),
        "deviation": ratings.std(dim=0, correction=0),
    }
    aspects = model.config.id2label.values()
    return {
        f"aspect_{name}": {aspect: round(float(value), 4) for aspect, value in zip(aspects, values, strict=True)}
        for name, values in found.items()
    }


ASPECTS = Recipe(
    seen="segments of responses, scored by aspect",
    describe=_describe,
    make_trainer=_make_trainer,
    load=_load,
    read=_read,
    aspects=_aspects,
    measure=_measure,
    kind="aspects",
)
