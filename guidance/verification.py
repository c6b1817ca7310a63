"""Proof, when an auxiliary model is loaded, that its cached forward is right on this device.

Cached outputs and plain ones are rounded in different orders, so they are never quite equal. How far they differ
depends on precision, depth, weights and head: in bfloat16 right models were off by 0.005 to 0.14 of their outputs' size
and by 0.005 to 0.2 of their spread, so no fraction of either tells right from wrong. Rounding is measured on the model
itself: plain forwards are repeated with every entry of the embeddings moved by one unit in the last place, from where
on everything is rounded anew. Cached outputs are rounded no more often. In root mean square they were off by these
multiples of what that changed:

    bfloat16    0.4 to 0.9 (medians of models), at most 2.5
    float16     0.4 to 0.8                      at most 2.4
    float32     0.6 to 1.4                      at most 3.4, which was 1e-6 of the outputs' size

over 2,000 probes in each precision: ten architectures with three scales of weights as reward models and next-token
models, Llama, Qwen 2, Mistral and Gemma 2 with 12 and 24 layers, up to the shape of Qwen 2.5 0.5B, and the demo's
trained models. Four times is allowed. Windows, masks, positions and writes that are off by one made more than 1e4 in
float32, and in bfloat16 7 to 30 with 12 layers. A fault that does less than rounding cannot be seen in the outputs.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from steersman.guidance.attention import ATTENTION_NAME
from steersman.guidance.auxiliary import CausalModel, Prefix
from steersman.guidance.checkpoints import ModelRefused

_CANDIDATES = 4
"""Of each sequence: enough for a stable mean, cheap on a CPU, and fewer than the smallest graph has room for."""

_ROUNDINGS = 4.0
"""Times the rounding that was measured."""
_OF_THE_SPREAD = 1e-4
"""An error that changes no choice, for what float32 on a GPU adds: attention multiplies in three passes of TF32."""


def verify(
    causal: CausalModel,
    vocabulary: int,
    branching: bool,
    finish: Callable[[torch.Tensor], torch.Tensor] = lambda outputs: outputs,
) -> None:
    """Compares cached outputs with plain full forwards of the unchanged model; raises ModelRefused where they differ.

    branching: whether candidates branch off each sequence; else its own last token is compared. finish: what makes the
    model's outputs of those of the cached forward.

    Allowed is the largest of four times the model's own rounding, 1e-4 of the spread of its outputs over candidates or
    vocabulary, and, where they hardly differ, one unit of precision of their size. None of them changes with the
    outputs' scale, and a head of zeros passes.
    """
    generator = torch.Generator().manual_seed(next(causal.probes))
    sequences = _draw_sequences(causal, vocabulary, generator)
    branches = _draw_branches(causal, vocabulary, (len(sequences), _CANDIDATES if branching else 0), generator)
    cached = finish(_evaluate_cached(causal, sequences, branches))
    plain = _evaluate_plainly(causal, sequences, branches)
    with _disturbed(causal, generator):
        disturbed = _evaluate_plainly(causal, sequences, branches)
    error, rounding = _size(cached - plain), _size(disturbed - plain)
    spread = (plain if branching else plain.mT).std(dim=1).mean().item()
    allowed = max(_ROUNDINGS * rounding, _OF_THE_SPREAD * spread, torch.finfo(causal.dtype).eps * _size(plain))
    if not math.isfinite(error) or error > allowed:
        raise ModelRefused(
            f"{causal.refusal} cached outputs differ from plain forwards by {error:.2g} (allowed {allowed:.2g}), "
            f"outputs from each other by {spread:.2g}"
        )


def _draw_sequences(causal: CausalModel, vocabulary: int, generator: torch.Generator) -> list[list[int]]:
    """One that is longer than a sliding window, one that a window may cover, and a short one."""
    config = causal.model.config.get_text_config()
    local = [getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_window")]
    reach = max((w for w in local if isinstance(w, int) and w <= 512), default=8)
    lengths = [min(length, causal.window - 2) for length in (reach + 9, reach // 2 + 8, 5)]
    return [torch.randint(vocabulary, (n,), generator=generator, device="cpu").tolist() for n in lengths]


def _draw_branches(
    causal: CausalModel, vocabulary: int, shape: tuple[int, int], generator: torch.Generator
) -> torch.Tensor:
    """Candidates [G, k]; none is padding, behind which a classifier would not look."""
    branches = torch.randint(vocabulary, shape, generator=generator, device="cpu")
    padding = _find_padding(causal)
    return branches if padding is None else torch.where(branches == padding, (padding + 1) % vocabulary, branches)


def _evaluate_cached(causal: CausalModel, sequences: list[list[int]], branches: torch.Tensor) -> torch.Tensor:
    """Outputs [G, k or 1, C] by the path that serves requests, in steps of two rows and of one."""
    prefixes = [Prefix(object(), sequence, []) for sequence in sequences]
    causal.catch_up(prefixes)
    last = torch.tensor([[s[-1]] for s in sequences], device="cpu")
    tokens = torch.cat((last, branches), dim=1).to(causal.device)
    outputs = []
    for rows, part in zip((prefixes[:2], prefixes[2:]), tokens.split(2), strict=True):
        lengths = [len(prefix) for prefix in rows]
        outputs.append(causal.step([p.key for p in rows], lengths, part, int(branches.shape[1] > 0)))
    for prefix in prefixes:
        causal.release(prefix.key)
    return torch.cat(outputs)


def _evaluate_plainly(causal: CausalModel, sequences: list[list[int]], branches: torch.Tensor) -> torch.Tensor:
    """The same outputs of the unchanged model, each text read whole."""
    outputs = []
    for sequence, row in zip(sequences, branches.tolist(), strict=True):
        texts = torch.tensor([[*sequence, token] for token in row] or [sequence], device=causal.device)
        # Classifiers take several texts at once only where they know what padding is.
        parts = texts.split(1 if _find_padding(causal) is None else len(texts))
        outputs.append(torch.cat([_evaluate_texts(causal.model, part) for part in parts]))
    return torch.stack(outputs)


def _evaluate_texts(model: Any, texts: torch.Tensor) -> torch.Tensor:
    """Outputs [n, C] float32 at the end of each text; `texts` [n, T] int64."""
    with _eager_attention(model):
        logits = model(input_ids=texts, attention_mask=torch.ones_like(texts)).logits.float()
    return logits[:, -1] if logits.dim() == 3 else logits


def _find_padding(causal: CausalModel) -> int | None:
    padding: int | None = causal.model.config.get_text_config().pad_token_id
    return padding


def _size(outputs: torch.Tensor) -> float:
    return outputs.square().mean().sqrt().item()


@contextmanager
def _disturbed(causal: CausalModel, generator: torch.Generator) -> Iterator[None]:
    """Inside, embeddings are off by about one unit in the last place, up or down at random."""
    step = torch.finfo(causal.dtype).eps

    def disturb(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(2, output.shape, generator=generator, device="cpu").mul(2).sub(1).to(output)
        return output * (1 + step * signs)

    with causal.model.get_input_embeddings().register_forward_hook(disturb):
        yield


@contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    """The eager implementation is a model's definition: others leave out what they cannot do (capped scores)."""
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
