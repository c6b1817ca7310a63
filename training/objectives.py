"""Losses of reward models, as pure functions of scores."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def bradley_terry(chosen: Tensor, rejected: Tensor, mask: Tensor | None = None) -> Tensor:
    """L = −mean log σ(r_chosen − r_rejected): Bradley and Terry's likelihood of the labels.

    On whole responses it trains a full-sequence reward model (ARGS). On prefixes of equal length it is equation 4 of
    PARGS, L_i = −log σ( r(y_w^{1:i} | x) − r(y_l^{1:i} | x) ), averaged over the prefixes at hand, each counting alike.

    chosen, rejected: [...] scores, any floating dtype; mask: [...] bool, False where a score is padding.
    """
    differences = chosen - rejected
    # Padding is left out before the loss, so that whatever stands there reaches no gradient.
    return -functional.logsigmoid(differences if mask is None else differences[mask]).mean()
