"""Outputs of a linear layer for a few tokens of each row: k rows of its weight are read, and not all V."""

import torch
import triton
import triton.language as tl

from steersman.kernels.launch import Launch, require_contiguous, require_rows

_PART = 128
"""Channels that are multiplied at once."""
_TOKENS = 16
"""Tokens of a row that one program computes."""


def gather_outputs(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tokens: torch.Tensor
) -> torch.Tensor:
    """weight[v] · features + bias[v] for the tokens v of each row, in float32.

    features: [B, R]. weight: [V, R], of any precision. bias: [V] or None. tokens: [B, k] integers below V.
    Returns [B, k] float32.
    """
    outputs = features.new_empty(tokens.shape, dtype=torch.float32)
    if tokens.numel():
        plan_launch(features.contiguous(), weight, bias, tokens.contiguous(), outputs).run()
    return outputs


def plan_launch(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    outputs: torch.Tensor,
) -> Launch:
    """The launch of `gather_outputs`; raises ValueError for a tensor whose strides the kernel cannot read."""
    require_rows(weight=weight)
    require_contiguous(features=features, tokens=tokens, outputs=outputs)
    (batch, k), rank = tokens.shape, features.shape[1]
    return Launch(
        _gather,
        (batch, triton.cdiv(k, _TOKENS)),
        dict(
            features_ptr=features, weight_ptr=weight, weight_stride=weight.stride(0),
            bias_ptr=weight if bias is None else bias, tokens_ptr=tokens, outputs_ptr=outputs, k=k, rank=rank,
        ),
        dict(TOKENS=_TOKENS, PART=_PART, HAS_BIAS=bias is not None),
        warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["k"])
def _gather(
    features_ptr, weight_ptr, weight_stride, bias_ptr, tokens_ptr, outputs_ptr, k, rank,
    TOKENS: tl.constexpr, PART: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    there = places < k
    tokens = tl.load(tokens_ptr + row * k + places, mask=there, other=0).to(tl.int64)
    total = tl.zeros([TOKENS], tl.float32)
    for start in range(0, rank, PART):
        channels = start + tl.arange(0, PART)
        inside = channels < rank
        features = tl.load(features_ptr + row * rank + channels, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(
            weight_ptr + tokens[:, None] * weight_stride + channels[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(weight * features[None, :], axis=1)
    if HAS_BIAS:
        total += tl.load(bias_ptr + tokens, mask=there, other=0.0).to(tl.float32)
    tl.store(outputs_ptr + row * k + places, total, mask=there)
