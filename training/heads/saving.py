"""A trained head as a checkpoint: its probe, how far its outputs spread, and its files written as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman.guidance.head_files import HeadCheckpoint, Probe, save_head
from steersman.guidance.heads import Head, describe_shape
from steersman.training.checkpoints import write_head_card
from steersman.training.figure import draw_accuracy
from steersman.training.heads.features import Features
from steersman.training.heads.frozen_base import FrozenBase
from steersman.training.heads.network import STORED
from steersman.training.output import replacing

_PROBES = 8
_SHORTEST, _LONGEST = 8, 64
_SPREAD_OVER = 10
_SPREAD_PLACES = 4096


def make_probe(base: FrozenBase, texts: Sequence[Sequence[int]]) -> Probe:
    """Beginnings of 8 to 64 tokens of texts from all over the training rows, each read by itself."""
    step = (_LONGEST - _SHORTEST) / (_PROBES - 1)
    # Texts that are long enough come first, so that lengths differ where the data allow it.
    order = sorted(range(len(texts)), key=lambda n: len(texts[n]) < _LONGEST)
    enough = sum(len(text) >= _LONGEST for text in texts) or len(texts)
    chosen = [texts[order[n * enough // _PROBES]] for n in range(_PROBES)]
    cut = [list(text[: round(_SHORTEST + n * step)]) for n, text in enumerate(chosen)]
    hidden = torch.cat([base.hidden([text])[:, -1].float().cpu() for text in cut])
    return Probe(cut, hidden)


@torch.no_grad()
def measure_spread(head: Head, base: FrozenBase, features: Features) -> float:
    """Mean over places of the standard deviation of outputs over the base's 10 likeliest tokens: guidance with β moves
    their log-probabilities by about β times this."""
    step = max(1, len(features.states) // _SPREAD_PLACES)
    deviations: list[Tensor] = []
    for hidden in features.states[::step].split(256):
        likeliest = base.logits(hidden.to(base.model.device)).topk(_SPREAD_OVER).indices.cpu()
        outputs = head.at(head.features(hidden), likeliest)
        deviations.append(outputs.std(dim=1, unbiased=False))
    return round(torch.cat(deviations).mean().item(), 4)


def write_head(
    folder: Path, checkpoint: HeadCheckpoint, facts: dict[str, Any], seen: str, *, figure: bool
) -> HeadCheckpoint:
    """Replaces what `folder` holds by the head, its card and its picture; returns the checkpoint with all facts."""
    whole = {**facts, **describe_shape(checkpoint.head.shape)}
    head = Head(checkpoint.head.shape)
    head.load_state_dict(checkpoint.head.state_dict())
    head.tokens.data = head.tokens.to(STORED)
    with replacing(folder) as unfinished:
        save_head(unfinished, HeadCheckpoint(head, checkpoint.role, checkpoint.base, checkpoint.probe, whole))
        if figure and "accuracy" in whole:
            draw_accuracy(unfinished, whole, folder.name)
        write_head_card(unfinished, folder.name, checkpoint.role, whole, seen)
    return HeadCheckpoint(checkpoint.head, checkpoint.role, checkpoint.base, checkpoint.probe, whole)
