"""Heads as reward models and policies of a server: loaded, described, and proven to fit the base that is served."""

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from steersman.guidance.checkpoints import ModelRefused, require_vocabulary
from steersman.guidance.head_files import BaseFacts, HeadCheckpoint, Probe, read_head
from steersman.guidance.heads import FrozenHead, describe_shape
from steersman.guidance.plan import Formula
from steersman.guidance.tokenizers import name_model

logger = logging.getLogger(__name__)

UNBOUNDED = 2**31 - 1
"""Window of a model that reads what the base has read, however long."""

NOTICEABLE = 0.05
"""Drift beyond it is logged. Measured with the demo's heads: 0.006 for a copy of the base in bfloat16, up to 0.018
for one in 8 bits, 0.02 to 0.12 for copies in 4 bits."""
LARGEST_DRIFT = 0.2
"""Drift beyond it is refused. Measured with the demo's heads: 0.17 for a copy in 3 bits, 0.29 to 0.43 for the base
fine-tuned by DPO, 0.5 and more for weights that are mostly noise."""


@dataclass(frozen=True)
class ServedBase:
    """What is known of the base model that is served, before a head is proven on it."""

    hidden_size: int
    layers: int
    vocabulary: int
    """Width of its logits."""
    window: int
    """Tokens of the longest text that it is served for."""
    quantization: str | None = None
    """The method that its weights are quantised by, as "compressed-tensors"; None where they are not."""


@dataclass(frozen=True)
class Drift:
    """How far a head's outputs on the served base are from those on the base that it was trained on."""

    error: float
    """Root mean square of the difference over tokens, in which a constant for all tokens has no part."""
    spread: float
    """Standard deviation of the trained outputs over tokens."""

    @property
    def share(self) -> float:
        """The error as a share of the spread; 0 for a head whose outputs are all equal."""
        return self.error / self.spread if self.spread else 0.0


class HeadModel:
    """What reward heads and policy heads have in common. They read nothing and cache nothing of their own."""

    kind: str
    adds_base: bool
    """Whether the head's outputs are added to the base's logits."""

    def __init__(
        self, checkpoint: HeadCheckpoint, name: str, device: torch.device | str, served: ServedBase | None = None
    ) -> None:
        """served: the base model of a server."""
        self.name = name
        self.window = UNBOUNDED if served is None else served.window
        self.quantization = None if served is None else served.quantization
        """Of the base that it is compared with."""
        self.base = checkpoint.base
        self.probe = checkpoint.probe
        self.head = FrozenHead(checkpoint.head, device)
        self.vocabulary = self.head.vocabulary
        self._facts = checkpoint.facts
        self.drift: Drift | None = None
        """Measured on the base that is served; None until then."""
        self.proven_on: Callable[[], Any] = lambda: None
        """A weak reference to the transformers model that it was last compared with."""

    def covers(self, key: Hashable, length: int) -> bool:
        """True: no token of a request is read."""
        return True

    def release(self, key: Hashable, tokens: Sequence[int] | None = None, failed: bool = False) -> None:
        """Does nothing: a request holds nothing here."""

    def tokens_per_step(self, formula: Formula) -> int:
        """0: the base has computed the hidden state anyway."""
        return 0

    def check(self) -> None:
        """Does nothing: the comparison needs the base model's hidden states, see `prove`."""

    def warm_up(self) -> None:
        """Compiles on a GPU what a step would otherwise have to."""
        self.head.warm_up()

    def capture(self) -> Iterator[None]:
        """Returns an empty iterator: a head runs no forward that could be captured."""
        return iter(())

    def describe(self) -> dict[str, Any]:
        """Facts for users: kind, sizes, objective, drift."""
        drift = {} if self.drift is None else {"drift": round(self.drift.share, 6)}
        known = {name: self._facts[name] for name in ("objective",) if name in self._facts}
        return {
            "name": self.name,
            "kind": self.kind,
            "vocabulary": self.vocabulary,
            "window": self.window,
            "weight_bytes": self.head.size,
            **describe_shape(self.head.shape),
            **known,
            **drift,
        }

    @torch.inference_mode()
    def measure_drift(self, hidden: torch.Tensor) -> Drift:
        """How far its outputs on another base are from those on the one that it was trained on.

        hidden: [texts, D] of the other base at the ends of the probe's texts.
        """
        texts = (self.probe.hidden.to(self.head.device), hidden.to(self.head.device))
        trained, served = (self.head.every(self.head.features(states)) for states in texts)
        return Drift(_spread_over_tokens(served - trained), _spread_over_tokens(trained))

    def prove(self, hidden: torch.Tensor) -> Drift:
        """Compares the base that is served with the one that the head was trained on; raises ModelRefused where its
        outputs are another model's. hidden: as in `measure_drift`, of the served base."""
        self.drift = drift = self.measure_drift(hidden)
        if not drift.share <= LARGEST_DRIFT:
            raise ModelRefused(
                f"{name_model(self)}: on this base model its outputs are off by {drift.share:.2g} of their spread, at "
                f"most {LARGEST_DRIFT:g} is allowed; {_explain_drift(self.quantization)}"
            )
        if drift.share > NOTICEABLE:
            logger.warning(
                "%s: on this base model its outputs are off by %.2g of their spread, as by another precision or "
                "quantisation than it was trained with",
                name_model(self),
                drift.share,
            )
        return drift


def _explain_drift(quantization: str | None) -> str:
    """Why a head is too far off on a base, and the way out. quantization: the base's."""
    if quantization is None:
        return "it is the head of another model, or of other weights: train it on this one"
    return (
        f"it is the head of another model, or this base's quantisation ({quantization}) is too coarse for it: train it "
        "on this one, or serve a copy with more bits"
    )


def _spread_over_tokens(outputs: torch.Tensor) -> float:
    """Of outputs [texts, V]: the root mean square deviation from each text's mean."""
    return float(outputs.var(dim=-1, correction=0).mean().sqrt())


class HeadReward(HeadModel):
    """A reward model whose rewards are a head's outputs: r(s·v) = U[v] · f(h(s)) + c[v]."""

    kind = "head"
    adds_base = False

    def warm_up(self) -> None:
        """Compiles on a GPU what a step would otherwise have to."""
        super().warm_up()
        self.head.warm_up_rerank(self.base.vocabulary)


class HeadPolicy(HeadModel):
    """A policy whose logits are the base's plus a head's outputs: log π(v | s) = log π₀(v | s) + head(s·v) + const."""

    kind = "policy_head"
    adds_base = True

    def warm_up(self) -> None:
        """Compiles on a GPU what a step would otherwise have to."""
        super().warm_up()
        self.head.warm_up_blend(self.base.vocabulary)


HEAD_KINDS = (HeadReward.kind, HeadPolicy.kind)
"""Kinds of models that are proven on the base's hidden states."""


def read_head_checkpoint(
    label: str,
    path: str | Path,
    role: str,
    base_tokenizer: PreTrainedTokenizerBase,
    served: ServedBase | None = None,
) -> HeadCheckpoint:
    """A head on the host; raises ModelRefused where it cannot belong to the base."""
    checkpoint = read_head(label, path, role)
    require_vocabulary(label, path, checkpoint.head.vocabulary, base_tokenizer)
    if served is not None:
        require_shape(label, path, checkpoint.base, served)
        _require_room(label, path, checkpoint.probe, served)
    return checkpoint


def require_shape(label: str, path: str | Path, trained: BaseFacts, served: ServedBase) -> None:
    """Raises ModelRefused where a head's base has another shape than the served one."""
    for name in ("hidden_size", "layers", "vocabulary"):
        own, needed = getattr(trained, name), getattr(served, name)
        if own != needed:
            raise ModelRefused(
                f"{label}: {path} is a head of a base model with {name.replace('_', ' ')} {own}, the served one has "
                f"{needed}; a head fits the base that it was trained on alone: train one on this base"
            )


def _require_room(label: str, path: str | Path, probe: Probe, served: ServedBase) -> None:
    # A token is generated behind each text.
    needed = 1 + max(map(len, probe.texts))
    if needed > served.window:
        raise ModelRefused(
            f"{label}: {path} is proven on texts of up to {needed - 1} tokens, the server takes {served.window} with "
            f"the answer; start it with --max-model-len {needed} or more"
        )
