"""A base model's decoding step of a given shape, as a server runs it: one CUDA graph over full caches, random weights.

What guidance costs is measured beside it. It does the same work every step: a token of every sequence attends to
`context` cached positions of its own, whichever tokens these were.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from steersman.benchmarks.shapes import Shape
from steersman.guidance.graphs import Captured, CudaCapture

_EPSILON = 1e-5


@dataclass(frozen=True)
class _Layer:
    qkv: torch.Tensor
    out: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class BaseStep:
    """A decoder of the Llama family without its rotary embedding, which costs nothing that could be measured."""

    def __init__(self, shape: Shape, vocabulary: int, context: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._context, self._dtype, self._device = shape, context, dtype, device
        self._width = shape.hidden // shape.heads
        self._embedding, self._head = (self._draw(vocabulary, shape.hidden) for _ in range(2))
        self._norm = torch.ones(shape.hidden, dtype=dtype, device=device)
        self._layers = [self._make_layer() for _ in range(shape.layers)]
        self._caches: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._capture = CudaCapture(device) if device.type == "cuda" else None
        self._captured: Captured | None = None
        self.tokens = torch.empty(0, dtype=torch.long, device=device)
        """[B] int64: what the next step feeds."""
        self.logits = torch.empty(0, vocabulary, device=device)
        """[B, V] float32: what the last step computed."""
        self.hidden = torch.empty(0, shape.hidden, dtype=dtype, device=device)
        """[B, D]: what it computed them from."""

    def prepare(self, sequences: int) -> None:
        """Makes caches, and a graph where there is a GPU, for so many sequences."""
        shape = self._shape
        size = (sequences, shape.kv_heads, self._context, self._width)
        # What the last graph held goes first.
        self._captured, self._caches = None, []
        self._caches = [(self._draw(*size), self._draw(*size)) for _ in range(shape.layers)]
        self.tokens = self.tokens.new_zeros(sequences)
        self.logits = self.logits.new_empty(sequences, self.logits.shape[1])
        self.hidden = self.hidden.new_empty(sequences, self.hidden.shape[1])
        if self._capture is not None:
            self._captured = self._capture(self._forward)

    def step(self) -> None:
        """Feeds `tokens` and leaves `hidden` and `logits`."""
        if self._captured is None:
            self._forward()
        else:
            self._captured.replay()

    def _forward(self) -> torch.Tensor:
        hidden = F.embedding(self.tokens, self._embedding)
        for layer, caches in zip(self._layers, self._caches, strict=True):
            hidden = hidden + F.linear(self._attend(layer, self._normalise(hidden), caches), layer.out)
            gate, up = F.linear(self._normalise(hidden), layer.gate_up).chunk(2, dim=-1)
            hidden = hidden + F.linear(F.silu(gate) * up, layer.down)
        self.hidden.copy_(self._normalise(hidden))
        return self.logits.copy_(F.linear(self.hidden, self._head))

    def _attend(self, layer: _Layer, hidden: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        sequences, shape = len(hidden), self._shape
        heads = F.linear(hidden, layer.qkv).view(sequences, 1, -1, self._width).transpose(1, 2)
        query, key, value = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        keys, values = caches
        keys[:, :, -1:], values[:, :, -1:] = key, value
        # The query heads that share a key head stand in the place of tokens: nothing is repeated.
        folded = query.reshape(sequences, shape.kv_heads, -1, self._width)
        return F.scaled_dot_product_attention(folded, keys, values).reshape(sequences, -1)

    def _normalise(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], self._norm, _EPSILON)

    def _make_layer(self) -> _Layer:
        shape = self._shape
        return _Layer(
            qkv=self._draw((shape.heads + 2 * shape.kv_heads) * self._width, shape.hidden),
            out=self._draw(shape.hidden, shape.heads * self._width),
            gate_up=self._draw(2 * shape.intermediate, shape.hidden),
            down=self._draw(shape.hidden, shape.intermediate),
        )

    def _draw(self, *size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=self._dtype, device=self._device).normal_(0, 0.02)
