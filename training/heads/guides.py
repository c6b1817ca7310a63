"""Decoding with a head in plain torch, for measurements without a server."""

from __future__ import annotations

import torch
from torch import Tensor

from steersman.guidance.heads import Head


class RewardGuide:
    """Logits of the base's `top_k` likeliest tokens plus β times their rewards; all others are ruled out."""

    def __init__(self, head: Head, beta: float, top_k: int = 10) -> None:
        self._head, self._beta, self._top_k = head, beta, top_k

    def __call__(self, hidden: Tensor, logits: Tensor) -> Tensor:
        best = logits.topk(self._top_k)
        rewards = self._head.at(self._head.features(hidden), best.indices)
        return torch.full_like(logits, -torch.inf).scatter(1, best.indices, best.values + self._beta * rewards)


class PolicyGuide:
    """log π₀ + mix · head over the whole vocabulary."""

    def __init__(self, head: Head, mix: float = 1.0) -> None:
        self._head, self._mix = head, mix

    def __call__(self, hidden: Tensor, logits: Tensor) -> Tensor:
        return logits + self._mix * self._head(hidden)
