"""Losses of reward models, as pure functions of scores. Every loss is a mean over what it is given."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    mask: Tensor | None = None,
    *,
    strength: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """L = −mean m [(1 − ε) log σ(r_chosen − r_rejected) + ε log σ(r_rejected − r_chosen)].

    With m = 1 and ε = 0 Bradley and Terry's likelihood of the labels. On whole responses it trains a full-sequence
    reward model (ARGS). On prefixes of equal length it is equation 4 of PARGS,
    L_i = −log σ( r(y_w^{1:i} | x) − r(y_l^{1:i} | x) ), averaged over the prefixes at hand, each counting alike.

    chosen, rejected: [...] scores, any floating dtype; mask: [...] bool, False where a score is padding.
    strength: [...] m, how much better the chosen response is: HelpSteer2-Preference's scaled loss.
    label_smoothing: ε, the share of labels that are taken to be wrong, as in robust and conservative DPO.
    """
    # Padding is left out first, so that whatever stands there reaches no gradient.
    differences = _kept(chosen - rejected, mask)
    losses = -(1 - label_smoothing) * functional.logsigmoid(differences)
    if label_smoothing:
        losses = losses - label_smoothing * functional.logsigmoid(-differences)
    return (losses if strength is None else _kept(strength, mask) * losses).mean()


def regression(scores: Tensor, ratings: Tensor, mask: Tensor | None = None) -> Tensor:
    """L = mean (r − rating)²: absolute ratings (HelpSteer2's regression), the aspects of 2D-DPO's reward model, which
    are read at each segment's last token, and Controlled Decoding's prefix scorer, whose rating at every prefix is the
    final reward of the answer that a rollout of the base made of it (CD-FUDGE).

    scores, ratings: [...]; mask: [...] bool, False where there is no rating.
    """
    return _kept(scores - ratings, mask).square().mean()


def distillation(scores: Tensor, taught: Tensor, mask: Tensor | None = None) -> Tensor:
    """L = mean of (Δ_v r − Δ_v r*)² over candidates v of a prefix, where Δ takes off the candidates' mean.

    A teacher's rewards of one prefix's candidates count up to a constant, as they do when an answer is decoded.
    scores, taught: [..., k]; mask: [...] bool, False where there is no prefix.
    """
    differences = _kept(scores - taught, mask)
    return (differences - differences.mean(dim=-1, keepdim=True)).square().mean()


def _kept(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values[mask]
