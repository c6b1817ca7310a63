"""What a reward head is trained towards: labels of pairs, ratings of answers, or the rewards of a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from steersman.guidance.checkpoints import declared_kind
from steersman.training.configuration import ConfigError, log
from steersman.training.data.preferences import TokenizedPreference
from steersman.training.heads.examples import Batch, Example, by_side, cut_pair, tokens_of
from steersman.training.heads.features import Features, Reading
from steersman.training.heads.frozen_base import FrozenBase
from steersman.training.heads.network import TrainedHead
from steersman.training.outputs import CHUNK, token_logits
from steersman.training.rewards.arguments import HeadTarget
from steersman.training.rewards.distilled import LEVEL, branch_scores, check_branches
from steersman.training.rewards.losses import bradley_terry, distillation, regression
from steersman.training.rewards.recipe import load_beside

LOSSES: dict[HeadTarget, str] = {
    "pairs": "Bradley-Terry on prefixes of equal length (PARGS, equation 4)",
    "ratings": "squared error of the answer's rating at every prefix (CD-FUDGE)",
    "teacher": "squared error of a teacher's rewards of the base's likeliest tokens, within a prefix",
}


@dataclass(frozen=True)
class Scale:
    """Of targets: a head is trained on (target − shift) / scale, whatever unit its data have."""

    scale: float = 1.0
    shift: float = 0.0

    def apply(self, targets: Tensor) -> Tensor:
        """What is trained on."""
        return (targets - self.shift) / self.scale


class RewardLoss:
    """A target's loss, a mean over places."""

    def __init__(self, target: HeadTarget, label_smoothing: float = 0.0) -> None:
        self._target = target
        self._smoothing = label_smoothing

    def __call__(self, head: TrainedHead, batch: Batch) -> Tensor:
        scores = head.at(head.features(batch["hidden"]), batch["tokens"])
        if self._target == "pairs":
            chosen, rejected = by_side(scores[:, 0], batch["owners"])
            return bradley_terry(chosen, rejected, label_smoothing=self._smoothing)
        targets = batch["targets"]
        if self._target == "ratings":
            return regression(scores, targets)
        return distillation(scores, targets) + LEVEL * regression(scores.mean(-1), targets.mean(-1))

    def count(self, batch: Batch) -> Tensor:
        """Places; in pairs, prefixes."""
        return torch.tensor(len(batch["tokens"]) // (2 if self._target == "pairs" else 1))


def pair_examples(
    features: Features, readings: Sequence[Reading], rows: Sequence[TokenizedPreference], cuts: Sequence[Sequence[int]]
) -> list[Example]:
    """A row for each pair, both responses cut alike."""
    return [cut_pair(features, readings, n, cuts[n], len(row.prompt)) for n, row in enumerate(rows)]


def rated_examples(
    features: Features, readings: Sequence[Reading], ratings: Sequence[float], scale: Scale
) -> list[Example]:
    """A row for each answer, whose rating every place is trained towards."""
    examples = []
    for n, (reading, rating) in enumerate(zip(readings, ratings, strict=True)):
        places = torch.arange(len(reading.places))
        targets = scale.apply(torch.full((len(places), 1), rating))
        tokens = tokens_of(reading).unsqueeze(1)
        examples.append(Example(features.rows(n, places), tokens, torch.zeros_like(places), targets))
    return examples


def rating_scale(ratings: Sequence[float]) -> Scale:
    """Mean and deviation of ratings."""
    values = torch.tensor(ratings, dtype=torch.float64)
    return Scale(values.std(unbiased=False).item() or 1.0, values.mean().item())


class Teacher:
    """A reward model of the base's tokens, which scores the base's likeliest tokens at every place."""

    def __init__(
        self, path: str, tokenizer: PreTrainedTokenizerBase, base: FrozenBase, top_k: int, longest: Sequence[int]
    ) -> None:
        """longest: a text to check it on. Raises ConfigError for a model that can't be taught by."""
        self._base, self._top_k = base, min(top_k, len(tokenizer))
        config = _read_config(path)
        self._gives_all = declared_kind(config) == "vocabulary"
        kind: Any = AutoModelForCausalLM if self._gives_all else AutoModelForSequenceClassification
        self._model: PreTrainedModel = load_beside(path, kind, tokenizer)
        if not self._gives_all:
            check_branches(self._model, longest, path)
        self._model.to(base.model.device)
        self._vocabulary = len(tokenizer)

    def examples(
        self, features: Features, readings: Sequence[Reading], batch: int, scale: Scale | None = None
    ) -> tuple[list[Example], Scale]:
        """A row for each reading, and the scale of its targets, by default their own: their deviation within a place.

        A place has the response's own token and the `top_k` likeliest ones of the base.
        """
        tokens = [torch.empty(0)] * len(readings)
        rewards = list(tokens)
        order = sorted(range(len(readings)), key=lambda n: -len(readings[n].ids))
        for start in range(0, len(order), batch):
            group = order[start : start + batch]
            if start and start // batch % 50 == 0:
                log(f"teacher: {start} of {len(order)} texts")
            for n, own, scores in zip(group, *self._score(features, readings, group), strict=True):
                tokens[n], rewards[n] = own, scores
        if scale is None:
            every = torch.cat(rewards)
            within = (every - every.mean(dim=1, keepdim=True)).square().mean().sqrt().item()
            scale = Scale(within or 1.0, every.mean().item())
        examples = []
        for n, (own, scores) in enumerate(zip(tokens, rewards, strict=True)):
            places = torch.arange(len(own))
            examples.append(Example(features.rows(n, places), own, torch.zeros_like(places), scale.apply(scores)))
        return examples, scale

    @torch.no_grad()
    def _score(
        self, features: Features, readings: Sequence[Reading], group: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of some readings: tokens [n, 1 + k] of their places, and the teacher's rewards of them."""
        device = self._model.device
        candidates = [self._candidates(features, readings[n], n) for n in group]
        longest, most = (max(len(getattr(readings[n], name)) for n in group) for name in ("ids", "places"))
        ids = torch.tensor([_padded(readings[n].ids, longest) for n in group], device=device)
        mask = torch.tensor([_padded([1] * len(readings[n].ids), longest) for n in group], device=device)
        places = torch.tensor([_padded(readings[n].places, most, -1) for n in group], device=device)
        padded = torch.nn.utils.rnn.pad_sequence(candidates, batch_first=True).to(device)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._gives_all:
            scores = token_logits(self._model, self._model, inputs, places, padded)
        else:
            scores = branch_scores(self._model, inputs, places, padded)
        return candidates, [own[: len(part)].float().cpu() for own, part in zip(scores, candidates, strict=True)]

    def _candidates(self, features: Features, reading: Reading, n: int) -> Tensor:
        hidden = features.states[features.rows(n, torch.arange(len(reading.places)))].to(self._base.model.device)
        parts = hidden.split(max(1, CHUNK // self._base.output_rows.shape[0]))
        logits = (self._base.logits(part)[:, : self._vocabulary] for part in parts)
        likeliest = torch.cat([part.topk(self._top_k).indices for part in logits]).cpu()
        return torch.cat((tokens_of(reading).unsqueeze(1), likeliest), dim=1)


def _padded(numbers: Sequence[int], length: int, padding: int = 0) -> list[int]:
    return [*numbers, *[padding] * (length - len(numbers))]


def _read_config(path: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"teacher: {path} can't be loaded: {str(error).splitlines()[0]}") from None
