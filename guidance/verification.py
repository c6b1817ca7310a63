"""Proof, when an auxiliary model is loaded, that its cached forward is right on this device."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from steersman.guidance.attention import ATTENTION_NAME
from steersman.guidance.auxiliary import CausalModel, Prefix
from steersman.guidance.checkpoints import ModelRefused


def verify(
    causal: CausalModel, evaluate: Callable[[torch.Tensor], torch.Tensor], vocabulary: int, candidates: int
) -> None:
    """Compares cached outputs with plain full forwards; raises ModelRefused where they differ.

    evaluate: full forward of the unchanged model, ids [1, n] → outputs [C] at the last token.
    candidates: how many branch off each sequence, 0 to compare at the sequence's own last token.
    """
    generator = torch.Generator().manual_seed(0)
    config = causal.model.config.get_text_config()
    local = [getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_window")]
    reach = max((w for w in local if isinstance(w, int) and w <= 512), default=8)
    lengths = [min(reach + 9, causal.window - 2), 5]
    sequences = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]
    branches = torch.randint(vocabulary, (2, candidates), generator=generator).to(causal.device)
    prefixes = [Prefix(f"probe-{n}", sequence, []) for n, sequence in enumerate(sequences)]
    causal.catch_up(prefixes)
    last = torch.tensor([[s[-1]] for s in sequences], device=causal.device)
    cached = causal.step([p.key for p in prefixes], lengths, torch.cat((last, branches), dim=1), int(candidates > 0))
    for prefix in prefixes:
        causal.release(prefix.key)
    full = torch.stack(
        [
            torch.stack([evaluate(torch.tensor([[*s, *suffix]])) for suffix in [[v] for v in row] or [[]]])
            for s, row in zip(sequences, branches.tolist(), strict=True)
        ]
    ).to(cached.device)
    error = (cached - full).abs().max().item()
    scale = max(1.0, full.abs().max().item())
    allowed = scale * (1e-3 if causal.dtype == torch.float32 else 4e-2)
    if not math.isfinite(error) or error > allowed:
        raise ModelRefused(
            f"{causal.refusal} cached outputs differ from plain forwards by {error:.2g} (allowed {allowed:.2g})"
        )


def evaluate_plainly(causal: CausalModel, ids: torch.Tensor) -> torch.Tensor:
    """The unchanged model's outputs for one text: ids [1, n] → [n, C], or [C] of a classifier."""
    ids = ids.to(causal.device)
    with _eager_attention(causal.model):
        return causal.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]


@contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    """The eager implementation is a model's definition: others leave out what they cannot do (capped scores)."""
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
