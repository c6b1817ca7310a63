"""What `benchmarks.kernels` compares: each kernel's shapes, random inputs, bytes that must move, rivals and truth."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from steersman.benchmarks import rivals
from steersman.kernels.arguments import BlendRows, HeadRows, HeadWeights, RewardTerms

OURS, EAGER, COMPILED = "steersman", "torch", "torch.compile"
ROWS_AND_VOCABULARY = ((1, 128_256), (8, 128_256), (64, 128_256), (256, 32_000))

Tensors = tuple[torch.Tensor, ...]
Version = Callable[..., Tensors]
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Contest:
    """One kernel at one shape. Every version takes the same inputs and returns the same outputs."""

    kernel: str
    shape: str
    rows: int
    floor_bytes: int
    """Least that has to be read and written."""
    make_inputs: Callable[[], Inputs]
    """Draws random arguments for one call, new ones each time."""
    versions: dict[str, Version]
    truth: Version
    """The same outputs, computed in float64."""
    limit: float = 1e-4
    """On the error of an output over its size."""
    unordered: frozenset[int] = field(default=frozenset())
    """Outputs that are not compared: ids of tied entries, whose order is torch's own in its versions."""


def all_contests(
    device: torch.device, sizes: Sequence[tuple[int, int]] = ROWS_AND_VOCABULARY, context: int = 1024
) -> Iterator[Contest]:
    """Every kernel at every size, the largest sizes first; contexts of `context` tokens for attention."""
    for rows, vocabulary in sorted(sizes, reverse=True):
        for dtype in (torch.float32, torch.bfloat16):
            for k in (10, 64):
                yield _topk(device, rows, vocabulary, k, dtype)
        yield _rerank(device, rows, vocabulary)
        yield _gather(device, rows, vocabulary)
        for heads in (1, 4):
            yield _head_rerank(device, rows, vocabulary, heads)
        for samples in (0, 1000):
            yield _blend(device, rows, vocabulary, samples)
        for gated in (False, True):
            yield _head_blend(device, rows, vocabulary, gated)
        yield _attention(device, rows, context)


def _topk(device: torch.device, rows: int, vocabulary: int, k: int, dtype: torch.dtype) -> Contest:
    from steersman.kernels.topk import make_workspace, topk_logprobs

    workspace = make_workspace(rows, vocabulary, device)
    versions: dict[str, Version] = {
        OURS: lambda logits: topk_logprobs(logits, k, workspace),
        EAGER: lambda logits: rivals.topk(logits, k),
        COMPILED: _compiled(lambda logits: rivals.topk(logits, k)),
        **rivals.other_topks(device, k),
    }
    return Contest(
        f"topk_logprobs, k = {k}, {_short(dtype)}",
        f"({rows}, {vocabulary})",
        rows,
        rows * vocabulary * dtype.itemsize,
        lambda: ((3 * torch.randn(rows, vocabulary, device=device)).to(dtype),),
        versions,
        lambda logits: rivals.topk(logits.double(), k),
        unordered=frozenset({0}),
    )


def _rerank(device: torch.device, rows: int, vocabulary: int, k: int = 10) -> Contest:
    from steersman.kernels.rerank import reward_rerank

    def make_inputs() -> Inputs:
        strength, scale, shift = torch.rand(3, rows, 1, device=device)
        terms = RewardTerms(strength, scale, shift, torch.zeros(rows, 1, device=device, dtype=torch.int32))
        return (
            torch.empty(rows, vocabulary, device=device), torch.arange(rows, device=device),
            torch.rand(rows, vocabulary, device=device).topk(k).indices,
            torch.randn(rows, k, device=device).log_softmax(-1), terms, torch.randn(rows, 1, k, device=device),
        )  # fmt: skip

    def ours(logits: torch.Tensor, *rest: Any) -> Tensors:
        return reward_rerank(logits, *rest), logits

    return Contest(
        f"reward_rerank, k = {k}",
        f"({rows}, {vocabulary})",
        rows,
        rows * vocabulary * 4,
        make_inputs,
        {OURS: ours, EAGER: rivals.rerank, COMPILED: _compiled(rivals.rerank)},
        lambda logits, *rest: rivals.rerank(logits.double(), *rest),
    )


def _gather(device: torch.device, rows: int, vocabulary: int, k: int = 10, rank: int = 1024) -> Contest:
    from steersman.kernels.gather import gather_outputs

    dtype = torch.bfloat16

    def make_inputs() -> Inputs:
        weight = torch.randn(vocabulary, rank, device=device).to(dtype)
        tokens = torch.randint(vocabulary, (rows, k), device=device)
        return torch.randn(rows, rank, device=device), weight, tokens

    return Contest(
        f"gather_outputs, k = {k}, R = {rank}, {_short(dtype)}",
        f"({rows}, {vocabulary})",
        rows,
        rows * (k * (rank * dtype.itemsize + 12) + 4 * rank),
        make_inputs,
        {
            OURS: lambda features, weight, tokens: (gather_outputs(features, weight, None, tokens),),
            EAGER: rivals.gather,
            COMPILED: _compiled(rivals.gather),
        },
        lambda features, weight, tokens: rivals.gather(features.double(), weight.double(), tokens),
    )


def _head_rerank(device: torch.device, rows: int, vocabulary: int, heads: int, k: int = 10, rank: int = 128) -> Contest:
    from steersman.kernels.head_rerank import head_rerank, make_workspace, tabulate_heads

    workspace, none = make_workspace(rows, vocabulary, device), torch.empty(0, device=device)
    sizes = ((vocabulary, rank), (vocabulary,))
    weights = [
        HeadWeights(none, none, none, none, *(torch.randn(*size, device=device) / rank**0.5 for size in sizes))
        for _ in range(heads)
    ]
    table, index = torch.tensor(tabulate_heads(weights), device=device), torch.arange(rows, device=device)

    def make_inputs() -> Inputs:
        strength, scale, shift = torch.rand(3, rows, heads, device=device)
        terms = RewardTerms(strength, scale, shift, torch.zeros(rows, heads, device=device, dtype=torch.int32))
        logits, features = torch.randn(rows, vocabulary, device=device), torch.randn(rows, heads * rank, device=device)
        return 3 * logits, features, HeadRows(index, k, None, weights, terms, table)

    def ours(logits: torch.Tensor, features: torch.Tensor, asked: HeadRows) -> Tensors:
        done = head_rerank(logits, features, asked, workspace)
        return done.scores, logits, done.logprobs, done.rewards

    def truth(logits: torch.Tensor, features: torch.Tensor, asked: HeadRows) -> Tensors:
        exact = [replace(head, tokens=head.tokens.double(), bias=head.bias.double()) for head in asked.heads]
        return rivals.head_rerank(logits.double(), features.double(), replace(asked, heads=exact))

    # The logits read once and written once, and the candidates' rows of every U.
    least = 8 * rows * vocabulary + 4 * rows * heads * (k * (rank + 1) + rank)
    return Contest(
        f"head_rerank, k = {k}, {heads} of R = {rank}",
        f"({rows}, {vocabulary})",
        rows,
        least,
        make_inputs,
        {OURS: ours, EAGER: rivals.head_rerank, COMPILED: _compiled(rivals.head_rerank)},
        truth,
    )


def _blend(device: torch.device, rows: int, vocabulary: int, samples: int) -> Contest:
    from steersman.kernels.blend import make_workspace, policy_blend

    workspace = make_workspace(rows, vocabulary, device)

    def make_inputs() -> Inputs:
        whole = torch.tensor([[0.3, 0.7]], device=device).expand(rows, 2).contiguous()
        asked = BlendRows(
            torch.arange(rows, device=device, dtype=torch.int32), torch.full((rows,), -torch.inf, device=device),
            whole, whole, torch.randint(2**62, (rows,), device=device),
        )  # fmt: skip
        return (*(torch.randn(rows, vocabulary, device=device) for _ in range(2)), asked)

    def ours(base: torch.Tensor, policy: torch.Tensor, asked: BlendRows) -> Tensors:
        return policy_blend(base, policy, asked, workspace, samples).kl, base

    def rival(base: torch.Tensor, policy: torch.Tensor, asked: BlendRows) -> Tensors:
        return rivals.blend(base, policy, asked, samples)

    return Contest(
        f"policy_blend, {f'{samples} samples' if samples else 'exact'}",
        f"({rows}, {vocabulary})",
        rows,
        3 * rows * vocabulary * 4,
        make_inputs,
        {OURS: ours, EAGER: rival, COMPILED: _compiled(rival)},
        lambda base, policy, asked: rivals.blend(base.double(), policy.double(), asked, 0),
    )


def _head_blend(device: torch.device, rows: int, vocabulary: int, gated: bool, rank: int = 160) -> Contest:
    from steersman.kernels.head_blend import head_blend, make_workspace

    workspace = make_workspace(rows, vocabulary, device)

    def make_inputs() -> Inputs:
        whole = torch.tensor([[0.3, 0.7]], device=device).expand(rows, 2).contiguous()
        threshold = torch.full((rows,), -1.0 if gated else -torch.inf, device=device)
        lines, seeds = torch.arange(rows, device=device, dtype=torch.int32), torch.zeros(rows, device=device).long()
        sizes = ((rows, vocabulary), (rows, rank), (vocabulary, rank), (vocabulary,))
        logits, features, weight, bias = (torch.randn(*size, device=device) for size in sizes)
        return logits, features, weight / rank**0.5, bias, BlendRows(lines, threshold, whole, whole, seeds)

    def ours(
        logits: torch.Tensor, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, asked: BlendRows
    ) -> Tensors:
        blended = head_blend(logits, features, weight, bias, asked, workspace, gated=gated)
        return blended.kl, logits, blended.base, blended.guided

    def truth(*inputs: Any) -> Tensors:
        return rivals.head_blend(*(x.double() if _is_float(x) else x for x in inputs))

    # U, and of each row the base's logits read, their copy and the guided row twice written.
    least = 4 * (vocabulary * (rank + 1) + 4 * rows * vocabulary)
    return Contest(
        f"head_blend, R = {rank}, {'a gate' if gated else 'no gate'}",
        f"({rows}, {vocabulary})",
        rows,
        least,
        make_inputs,
        {OURS: ours, EAGER: rivals.head_blend, COMPILED: _compiled(rivals.head_blend)},
        truth,
    )


def _attention(device: torch.device, rows: int, context: int, k: int = 10) -> Contest:
    from steersman.kernels.attention import candidate_attention

    heads, shared, width, block = 8, 2, 128, 16
    wide = context // block + 1
    # Triton's interpreter cannot multiply matrices in bfloat16.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16

    def make_inputs() -> Inputs:
        fed = torch.randn(rows, 1 + k, heads * (shared + 2), width, device=device).to(dtype).transpose(1, 2)
        caches = [torch.randn(heads, rows * wide, block, width, device=device).to(dtype) for _ in range(2)]
        tables = torch.randperm(rows * wide, device=device).view(rows, wide)
        lengths = torch.full((rows,), context, device=device, dtype=torch.int32)
        return (*fed.split([heads * shared, heads, heads], dim=1), *caches, tables, lengths, k, width**-0.5)

    def ours(*inputs: Any) -> Tensors:
        return (candidate_attention(*inputs),)

    def truth(*inputs: Any) -> Tensors:
        return rivals.attention(*(x.double() if _is_float(x) else x for x in inputs))

    return Contest(
        f"candidate_attention, k = {k}, {heads} heads of {width}, context {context}",
        f"({rows})",
        rows,
        2 * rows * heads * width * 2 * context,
        make_inputs,
        {OURS: ours, EAGER: rivals.attention, COMPILED: _compiled(rivals.attention)},
        truth,
        limit=torch.finfo(dtype).eps,
    )


def _compiled(version: Version) -> Version:
    return torch.compile(version, dynamic=False, fullgraph=True)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
