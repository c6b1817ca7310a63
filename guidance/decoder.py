"""The common decoder family in few large operations: what bounds small auxiliary models is how many they are.

Llama, Mistral, Qwen 2 and Qwen 3 differ in biases, in norms of queries and keys, and in windows. Projections that read
the same input are one matrix here. The checkpoint's own modules keep views of the same memory, so that nothing is held
twice, and the comparison with plain forwards that every auxiliary model has to pass is made with them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from steersman.guidance import attention
from steersman.guidance.attention import AttentionBatch, AttentionSettings, CandidateBatch

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_STATIC_ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose frequencies do not depend on the length of the sequence."""


@dataclass(frozen=True)
class _Layer:
    settings: AttentionSettings
    input_norm: torch.Tensor
    qkv: torch.Tensor
    """[(HQ + 2 H) d, D]."""
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None
    """[HQ + H, 1, d]."""
    out: torch.Tensor
    out_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    """[2 I, D]."""
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    activation: Callable[[torch.Tensor], torch.Tensor]


class FusedDecoder:
    """Hidden states of a decoder over the paged cache."""

    def __init__(self, body: Any, settings: Sequence[AttentionSettings], longest: int) -> None:
        """longest: no token stands at this position or behind it."""
        first = body.layers[0].self_attn
        self._embed: torch.nn.Embedding = body.embed_tokens
        self._norm: torch.Tensor = body.norm.weight
        self._epsilon: float = body.norm.variance_epsilon
        self._width: int = first.head_dim
        self._heads = first.k_proj.weight.shape[0] // self._width
        self._query_heads = first.q_proj.weight.shape[0] // self._width
        self._rotary = _rotary_table(body.rotary_emb, longest, self._norm.dtype)
        self._layers = [self._fuse_layer(layer, s) for layer, s in zip(body.layers, settings, strict=True)]

    def __call__(self, ids: torch.Tensor, batch: AttentionBatch | CandidateBatch) -> torch.Tensor:
        """ids [G, T] int64 → hidden states [G, T, D] behind the last norm."""
        rows, fed = ids.shape
        hidden = self._embed(ids).view(rows * fed, -1)
        rotary = F.embedding(batch.positions, self._rotary).unsqueeze(1)
        for number, layer in enumerate(self._layers):
            attended = self._attend(number, layer, self._normalise(hidden, layer.input_norm), rotary, batch)
            hidden = _add_linear(hidden, attended, layer.out, layer.out_bias)
            wide = F.linear(self._normalise(hidden, layer.mlp_norm), layer.gate_up, layer.gate_up_bias)
            gate, up = wide.chunk(2, dim=-1)
            hidden = _add_linear(hidden, layer.activation(gate) * up, layer.down, layer.down_bias)
        return self._normalise(hidden, self._norm).view(rows, fed, -1)

    def _attend(
        self,
        number: int,
        layer: _Layer,
        hidden: torch.Tensor,
        rotary: torch.Tensor,
        batch: AttentionBatch | CandidateBatch,
    ) -> torch.Tensor:
        rows, fed = batch.positions.shape
        turned = self._query_heads + self._heads
        heads = F.linear(hidden, layer.qkv, layer.qkv_bias).view(rows, fed, -1, self._width).transpose(1, 2)
        both = heads[:, :turned]
        if layer.qk_norm is not None:
            both = F.rms_norm(both, (self._width,), None, self._epsilon) * layer.qk_norm
        cosine, sine = rotary.chunk(2, dim=-1)
        both = torch.addcmul(both * cosine, both.roll(self._width // 2, -1), sine)
        query, key, value = both[:, : self._query_heads], both[:, self._query_heads :], heads[:, turned:]
        return attention.attend_paged(batch, number, query, key, value, layer.settings).reshape(rows * fed, -1)

    def _normalise(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, weight.shape, weight, self._epsilon)

    def _fuse_layer(self, layer: Any, settings: AttentionSettings) -> _Layer:
        own, mlp = layer.self_attn, layer.mlp
        qkv, qkv_bias = _join([own.q_proj, own.k_proj, own.v_proj])
        gate_up, gate_up_bias = _join([mlp.gate_proj, mlp.up_proj])
        qk_norm = None
        if hasattr(own, "q_norm"):
            norms = [own.q_norm.weight] * self._query_heads + [own.k_norm.weight] * self._heads
            qk_norm = torch.stack(norms).unsqueeze(1)
        return _Layer(
            settings,
            *(layer.input_layernorm.weight, qkv, qkv_bias, qk_norm, own.o_proj.weight, own.o_proj.bias),
            *(layer.post_attention_layernorm.weight, gate_up, gate_up_bias, mlp.down_proj.weight, mlp.down_proj.bias),
            mlp.act_fn,
        )


def fuse_decoder(model: Any, settings: Sequence[AttentionSettings], longest: int) -> FusedDecoder | None:
    """A fused decoder over the model's own weights, or None where it is not of a family that this is written for.

    longest: no token will stand at this position or behind it.
    """
    body = model.base_model
    if model.config.model_type not in FAMILIES or body.rotary_emb.rope_type not in _STATIC_ROTARY:
        return None
    plain = all(s.is_plain for s in settings)
    linear = all(type(module) is torch.nn.Linear for name, module in body.named_modules() if name.endswith("_proj"))
    return FusedDecoder(body, settings, longest) if plain and linear else None


def _rotary_table(rotary: Any, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Cosines and sines [length, 2 d], the first half of the sines negated: x · cos + roll(x) · sin rotates x."""
    positions = torch.arange(length, device=rotary.inv_freq.device)
    angles = positions.unsqueeze(-1) * rotary.inv_freq.float()
    cosine, sine = angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling
    return torch.cat((cosine, cosine, -sine, sine), dim=-1).to(dtype)


def _join(modules: Sequence[torch.nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One matrix, and one bias where there are biases, of several projections, which become views of it."""
    weight = torch.cat([module.weight for module in modules])
    bias = None if modules[0].bias is None else torch.cat([module.bias for module in modules])
    sizes = [module.out_features for module in modules]
    biases = [None] * len(modules) if bias is None else bias.split(sizes)
    for module, own_weight, own_bias in zip(modules, weight.split(sizes), biases, strict=True):
        module.weight = torch.nn.Parameter(own_weight, requires_grad=False)
        if own_bias is not None:
            module.bias = torch.nn.Parameter(own_bias, requires_grad=False)
    return weight, bias


def _add_linear(
    hidden: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    result = torch.addmm(hidden, added, weight.t())
    return result if bias is None else result.add_(bias)
