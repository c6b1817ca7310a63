"""What `benchmarks.kernels` compares: each kernel's shapes, random inputs, bytes that must move, and its rivals."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from steersman.kernels import reference
from steersman.kernels.arguments import BlendRows, RewardTerms

OURS, EAGER, COMPILED = "steersman", "torch", "torch.compile"
ROWS_AND_VOCABULARY = ((1, 128_256), (8, 128_256), (64, 128_256), (256, 32_000))

Version = Callable[..., Any]
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Contest:
    """One kernel at one shape."""

    kernel: str
    shape: str
    floor_bytes: int
    """Least that has to be read and written."""
    make_inputs: Callable[[], Inputs]
    """Fresh random arguments, the same for every version."""
    versions: dict[str, Version]


def all_contests(
    device: torch.device, sizes: Sequence[tuple[int, int]] = ROWS_AND_VOCABULARY, context: int = 1024
) -> Iterator[Contest]:
    """Every kernel at every size; contexts of `context` tokens for attention."""
    for rows, vocabulary in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            for k in (10, 64):
                yield _topk(device, rows, vocabulary, k, dtype)
        yield _rerank(device, rows, vocabulary)
        for samples in (0, 1000):
            yield _blend(device, rows, vocabulary, samples)
    for rows in dict.fromkeys(rows for rows, _ in sizes):
        yield _attention(device, rows, context)


def _topk(device: torch.device, rows: int, vocabulary: int, k: int, dtype: torch.dtype) -> Contest:
    from steersman.kernels.topk import make_workspace, topk_logprobs

    workspace = make_workspace(rows, vocabulary, device)
    versions: dict[str, Version] = {
        OURS: lambda logits: topk_logprobs(logits, k, workspace),
        **_twins(partial(_topk_twin, k)),
    }
    if importlib.util.find_spec("flashinfer") is not None:
        flashinfer = importlib.import_module("flashinfer")
        # Without log-probabilities: it does less.
        versions["FlashInfer top_k"] = lambda logits: flashinfer.top_k(logits, k, sorted=True)
    versions |= _vllms_topk(device, k)
    return Contest(
        f"topk_logprobs, k = {k}, {_short(dtype)}",
        f"({rows}, {vocabulary})",
        rows * vocabulary * dtype.itemsize,
        lambda: (3 * torch.randn(rows, vocabulary, device=device).to(dtype),),
        versions,
    )


def _vllms_topk(device: torch.device, k: int) -> dict[str, Version]:
    """vLLM's own way to top log-probabilities: torch's selection, then a kernel that normalises. For GPUs only."""
    if device.type != "cuda":
        return {}
    try:
        from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs
    except ImportError:
        return {}
    return {"vLLM": lambda logits: compute_token_logprobs(logits, logits.topk(k, dim=-1).indices)}


def _topk_twin(k: int, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return reference.topk_logprobs(logits, k)


def _rerank(device: torch.device, rows: int, vocabulary: int, k: int = 10, width: int = 896) -> Contest:
    from steersman.kernels.rerank import reward_rerank

    def make_inputs() -> Inputs:
        ids = torch.rand(rows, vocabulary, device=device).topk(k).indices.int()
        strength, scale, shift = torch.rand(3, rows, 1, device=device)
        terms = RewardTerms(strength, scale, shift, torch.zeros(rows, 1, device=device).int())
        hidden, heads = torch.randn(rows, k, width, device=device), torch.randn(1, width, device=device)
        return (
            *(torch.empty(rows, vocabulary, device=device), torch.arange(rows, device=device, dtype=torch.int32), ids),
            *(torch.randn(rows, k, device=device).log_softmax(-1), terms, torch.empty(rows, 1, k, device=device)),
            *(hidden.bfloat16(), heads.bfloat16(), torch.zeros(1, device=device)),
        )

    return Contest(
        f"reward_rerank, k = {k}, D = {width}",
        f"({rows}, {vocabulary})",
        rows * (vocabulary * 4 + k * width * 2),
        make_inputs,
        {OURS: reward_rerank, **_twins(reference.reward_rerank)},
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

    return Contest(
        f"policy_blend, {f'{samples} samples' if samples else 'exact'}",
        f"({rows}, {vocabulary})",
        3 * rows * vocabulary * 4,
        make_inputs,
        {
            OURS: lambda base, policy, asked: policy_blend(base, policy, asked, workspace, samples),
            **_twins(lambda base, policy, asked: reference.policy_blend(base, policy, asked, samples)),
        },
    )


def _attention(device: torch.device, rows: int, context: int, k: int = 10) -> Contest:
    from steersman.kernels.attention import candidate_attention

    heads, shared, width, block = 8, 2, 128, 16
    wide = context // block + 1

    def make_inputs() -> Inputs:
        fed = torch.randn(rows, 1 + k, heads * (shared + 2), width, device=device).bfloat16().transpose(1, 2)
        caches = [torch.randn(heads, rows * wide, block, width, device=device).bfloat16() for _ in range(2)]
        tables = torch.randperm(rows * wide, device=device).view(rows, wide)
        lengths = torch.full((rows,), context, device=device, dtype=torch.int32)
        return (*fed.split([heads * shared, heads, heads], dim=1), *caches, tables, lengths, k, width**-0.5)

    return Contest(
        f"candidate_attention, k = {k}, {heads} heads of {width}, context {context}",
        f"({rows})",
        2 * rows * heads * width * 2 * context,
        make_inputs,
        {OURS: candidate_attention, **_twins(reference.candidate_attention)},
    )


def _twins(twin: Version) -> dict[str, Version]:
    return {EAGER: twin, COMPILED: torch.compile(twin, dynamic=False)}


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
