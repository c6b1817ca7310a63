"""Preference pairs from several answers to a prompt: the best and the worst, by an aspects reward model's scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steersman.training.data.fields import template_options
from steersman.training.data.preferences import (
    DataError,
    Preference,
    prompt_ids,
    response_ids,
    response_text,
    segmented,
)
from steersman.training.data.segmentation import cut_into_segments
from steersman.training.data.segments import HIGHEST
from steersman.training.iterative.representatives import represent
from steersman.training.rewards.aspects import score_segments


@dataclass(frozen=True)
class AspectScorer:
    """An aspects reward model and how its scores make one number of a response."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: Mapping[str, float]
    """Aspect → weight, in the order of the model's outputs."""
    representatives: Mapping[str, str]
    window: int


@dataclass(frozen=True)
class Answer:
    """One scored answer to a prompt."""

    response: Any
    """Text, or messages where the prompt is messages."""
    segments: list[dict[str, Any]]
    """As rows have them, scores included."""
    reward: float


def question(asked: Mapping[str, Any], response: Any = "", **more: Any) -> Preference:
    """A row of prompts, which has `prompt` and perhaps what a chat template is given, with a response."""
    options = template_options(dict(asked)) if isinstance(asked["prompt"], list) else {}
    return Preference(asked["prompt"], response, response, "a prompt", template_options=options, **more)


def score_answers(asked: Mapping[str, Any], texts: Sequence[str], scorer: AspectScorer) -> list[Answer]:
    """Those of the answers that fit into the window and whose segments have tokens of their own, scored."""
    read = [row for row in (_read(asked, text, scorer) for text in texts) if row is not None]
    scores = score_segments(scorer.model, [place for _, _, place in read])
    return [
        Answer(response, _scored(segments, own, scorer), represent(own, scorer.weights, scorer.representatives))
        for (response, segments, _), own in zip(read, scores, strict=True)
    ]


def make_pair(asked: Mapping[str, Any], answers: Sequence[Answer]) -> dict[str, Any] | None:
    """A row of prompts with the best and the worst answer; None where none is better than another."""
    if not answers:
        return None
    best, worst = (choose(answers, key=lambda answer: answer.reward) for choose in (max, min))
    if best.reward == worst.reward:
        return None
    return {
        **asked,
        "chosen": best.response,
        "rejected": worst.response,
        "score_chosen": best.reward,
        "score_rejected": worst.reward,
        "chosen_segments": best.segments,
        "rejected_segments": worst.segments,
    }


def _read(
    asked: Mapping[str, Any], text: str, scorer: AspectScorer
) -> tuple[Any, list[dict[str, Any]], tuple[list[int], list[int], list[int]]] | None:
    """An answer as a row has it, its segments, and prompt ids, response ids and segments' ends."""
    response = text if isinstance(asked["prompt"], str) else [{"role": "assistant", "content": text}]
    segments = [{"text": segment} for segment in cut_into_segments(text)]
    row = question(asked, response, chosen_segments=segments)
    rendered = response_text(row, "chosen", scorer.tokenizer)
    before, ids = prompt_ids(row, scorer.tokenizer), response_ids(rendered, scorer.tokenizer)
    if len(before) + len(ids) > scorer.window:
        return None
    try:
        ends = segmented(row, "chosen_segments", rendered, ids, scorer.tokenizer, ()).ends
    except DataError:
        return None
    return response, segments, (before, ids, ends)


def _scored(segments: Sequence[dict[str, Any]], scores: Tensor, scorer: AspectScorer) -> list[dict[str, Any]]:
    kept = scores.clamp(0, HIGHEST).tolist()
    return [
        segment | {"scores": dict(zip(scorer.weights, line, strict=True))}
        for segment, line in zip(segments, kept, strict=True)
    ]
