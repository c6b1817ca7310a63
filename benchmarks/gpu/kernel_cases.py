"""What `check_kernels` runs: each kernel at sizes that are served, awkward ones among them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from steersman.kernels import reference
from steersman.kernels.arguments import BlendRows, HeadRows, HeadWeights, RewardTerms
from steersman.kernels.attention import candidate_attention
from steersman.kernels.blend import make_workspace as make_blend_workspace
from steersman.kernels.blend import policy_blend
from steersman.kernels.gather import gather_outputs
from steersman.kernels.head_blend import head_blend
from steersman.kernels.head_blend import make_workspace as make_head_workspace
from steersman.kernels.head_rerank import head_rerank, tabulate_heads
from steersman.kernels.head_rerank import make_workspace as make_rerank_workspace
from steersman.kernels.rerank import reward_rerank
from steersman.kernels.topk import make_workspace, topk_logprobs

Tensors = tuple[torch.Tensor, ...]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One kernel at one size. `run` and `truth` take what `make` returns and give the same outputs, `truth` from
    float64; `limit` bounds the error over the size of each output."""

    name: str
    make: Callable[[], tuple[Any, ...]]
    run: Callable[..., Tensors]
    truth: Callable[..., Tensors]
    limit: float = 1e-5


@dataclass(frozen=True)
class Attended:
    """Sizes of an attention case."""

    rows: int
    query_heads: int
    heads: int
    width: int
    k: int
    branches: int
    context: int
    dtype: torch.dtype
    window: int | None = None


def all_cases(device: torch.device) -> Iterator[Case]:
    """Sizes that are served: vocabularies up to 128,256, 64 rows and more, contexts up to 4,096 tokens."""
    for rows, vocabulary, k, dtype in (
        (3, 4099, 17, FP32), (8, 128_256, 10, FP32), (64, 128_256, 64, BF16), (300, 32_000, 10, FP32),
    ):  # fmt: skip
        yield topk_case(device, rows, vocabulary, k, dtype)
    yield rerank_case(device, 8, 128_256, 10, terms=1)
    yield rerank_case(device, 64, 128_256, 40, terms=3)
    for rows, vocabulary, k, ranks in (
        (1, 128_256, 10, (128,)), (8, 50_257, 64, (129, 48)), (64, 128_256, 10, (128,) * 8), (300, 32_000, 20, (160,)),
    ):  # fmt: skip
        yield head_rerank_case(device, rows, vocabulary, k, ranks)
    yield gather_case(device, 64, 128_256, 10, 128, FP32)
    yield gather_case(device, 32, 128_256, 64, 1024, BF16)
    for rows, vocabulary, dtype in ((8, 50_257, FP32), (64, 128_256, FP32), (8, 128_256, BF16)):
        yield blend_case(device, rows, vocabulary, dtype)
    yield sampled_case(device, 8, 128_256, 1000)
    for rows, vocabulary, rank, gated in ((8, 50_257, 129, True), (64, 128_256, 160, False), (150, 32_000, 160, True)):
        yield head_blend_case(device, rows, vocabulary, rank, gated)
    for sizes in (
        Attended(4, 14, 2, 64, 10, 1, 1100, BF16), Attended(64, 14, 2, 64, 10, 1, 1024, BF16),
        Attended(8, 32, 8, 128, 1, 0, 4096, BF16), Attended(1, 14, 2, 64, 20, 2, 3000, BF16),
        Attended(4, 32, 8, 128, 10, 1, 700, FP16, window=128), Attended(2, 14, 2, 64, 64, 2, 300, FP32),
    ):  # fmt: skip
        yield attention_case(device, sizes)


def sanitized_cases(device: torch.device) -> Iterator[Case]:
    """Every kernel and both ways through attention at sizes that compute-sanitizer gets through in seconds."""
    yield topk_case(device, 3, 4099, 17, FP32)
    yield rerank_case(device, 3, 4099, 10, terms=2)
    yield head_rerank_case(device, 3, 9001, 17, (129, 16))
    yield gather_case(device, 3, 4099, 17, 129, FP32)
    yield blend_case(device, 3, 4099, FP32)
    yield sampled_case(device, 2, 4099, 100)
    yield head_blend_case(device, 3, 4099, 129, gated=False)
    yield head_blend_case(device, 20, 1030, 40, gated=True)
    yield attention_case(device, Attended(2, 14, 2, 64, 10, 1, 600, BF16, window=64))
    yield attention_case(device, Attended(3, 4, 2, 24, 5, 2, 130, FP32))


def tiny_cases(device: torch.device) -> Iterator[Case]:
    """What Triton's interpreter gets through; it cannot multiply matrices in bfloat16."""
    yield topk_case(device, 1, 300, 5, FP32)
    yield rerank_case(device, 2, 300, 5, terms=2)
    yield head_rerank_case(device, 2, 300, 5, (7, 16))
    yield gather_case(device, 2, 300, 5, 40, BF16)
    yield blend_case(device, 2, 300, BF16)
    yield sampled_case(device, 1, 300, 50)
    yield head_blend_case(device, 2, 300, 20, gated=True)
    yield attention_case(device, Attended(2, 4, 2, 16, 3, 1, 40, FP16))


def topk_case(device: torch.device, rows: int, vocabulary: int, k: int, dtype: torch.dtype) -> Case:
    """Ids, log-probabilities and log-sum-exps of the k largest logits."""

    def run(logits: torch.Tensor) -> Tensors:
        return topk_logprobs(logits, k, make_workspace(rows, vocabulary, device))

    def truth(logits: torch.Tensor) -> Tensors:
        order = logits.double().sort(dim=-1, descending=True, stable=True)
        totals = logits.double().logsumexp(dim=-1)
        return order.indices[:, :k], order.values[:, :k] - totals.unsqueeze(-1), totals

    name = f"topk_logprobs ({rows}, {vocabulary}), k = {k}, {_short(dtype)}"
    return Case(name, lambda: ((3 * torch.randn(rows, vocabulary, device=device)).to(dtype),), run, truth)


def rerank_case(device: torch.device, rows: int, vocabulary: int, k: int, terms: int) -> Case:
    """Scores and the rows that they are written into, one row that nobody asks for among them."""

    def make() -> tuple[Any, ...]:
        strength, scale, shift = torch.randn(3, rows, terms, device=device)
        squashed = torch.randint(2, (rows, terms), device=device, dtype=torch.int32)
        ids = torch.rand(rows, vocabulary, device=device).topk(k).indices
        places = torch.randperm(rows + 1, device=device)[:rows]
        return (
            torch.randn(rows + 1, vocabulary, device=device), places, ids,
            torch.randn(rows, k, device=device).log_softmax(dim=-1), RewardTerms(strength, scale, shift, squashed),
            torch.randn(rows, terms, k, device=device),
        )  # fmt: skip

    def run(logits: torch.Tensor, *rest: Any) -> Tensors:
        return reward_rerank(logits, *rest), logits

    def truth(
        logits: torch.Tensor, places: torch.Tensor, ids: torch.Tensor, logprobs: Any, terms: Any, r: Any
    ) -> Tensors:
        exact = RewardTerms(terms.strength.double(), terms.scale.double(), terms.shift.double(), terms.log_sigmoid)
        whole = logits.double()
        return reference.reward_rerank(whole, places, ids, logprobs.double(), exact, r.double()), whole

    return Case(f"reward_rerank ({rows}, {vocabulary}), k = {k}, {terms} rewards", make, run, truth)


def head_rerank_case(device: torch.device, rows: int, vocabulary: int, k: int, ranks: Sequence[int]) -> Case:
    """What becomes of candidates that heads score, with limits of each row's own and a head that lacks some tokens, and
    the rows that they are written into, one row that nobody asks for among them."""

    def draw_head(rank: int, width: int) -> HeadWeights:
        none = torch.empty(0, device=device)
        tokens = torch.randn(width, rank, device=device) / rank**0.5
        return HeadWeights(none, none, none, none, tokens, torch.randn(width, device=device))

    def make() -> tuple[Any, ...]:
        heads = [draw_head(rank, vocabulary - 20 * place) for place, rank in enumerate(ranks)]
        strength, scale, shift = torch.randn(3, rows, len(ranks), device=device)
        squashed = torch.randint(2, (rows, len(ranks)), device=device, dtype=torch.int32)
        asked = HeadRows(
            torch.randperm(rows + 1, device=device)[:rows], k, torch.randint(1, k + 1, (rows, 1), device=device), heads,
            RewardTerms(strength, scale, shift, squashed), torch.tensor(tabulate_heads(heads), device=device),
        )  # fmt: skip
        logits = 3 * torch.randn(rows + 1, vocabulary, device=device)
        # The most likely token is nobody's to mask: a row without a candidate has no scores.
        logits[:, 0] = 20.0
        return logits, torch.randn(rows, sum(ranks), device=device), asked

    def run(logits: torch.Tensor, features: torch.Tensor, asked: HeadRows) -> Tensors:
        done = head_rerank(logits, features, asked, make_rerank_workspace(rows, vocabulary, device))
        return logits, done.ids, done.values, done.logprobs, done.scores, done.rewards, done.broken

    def truth(logits: torch.Tensor, features: torch.Tensor, asked: HeadRows) -> Tensors:
        terms = asked.terms
        doubled = (terms.strength.double(), terms.scale.double(), terms.shift.double())
        exact = replace(asked, terms=RewardTerms(*doubled, terms.log_sigmoid), heads=list(map(_doubled, asked.heads)))
        whole = logits.double()
        done = reference.head_rerank(whole, features.double(), exact)
        return whole, done.ids, done.values, done.logprobs, done.scores, done.rewards, done.broken

    return Case(f"head_rerank ({rows}, {vocabulary}), k = {k}, R = {', '.join(map(str, ranks))}", make, run, truth)


def _doubled(head: HeadWeights) -> HeadWeights:
    return replace(head, tokens=head.tokens.double(), bias=head.bias.double())


def gather_case(device: torch.device, rows: int, vocabulary: int, k: int, rank: int, dtype: torch.dtype) -> Case:
    """Outputs of a linear layer with a bias for k tokens of each row."""

    def make() -> tuple[Any, ...]:
        weight = torch.randn(vocabulary, rank, device=device).to(dtype)
        tokens = torch.randint(vocabulary, (rows, k), device=device)
        return torch.randn(rows, rank, device=device), weight, weight[:, 0].contiguous(), tokens

    def truth(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, tokens: torch.Tensor) -> Tensors:
        chosen = weight[tokens.long()].double()
        return ((chosen @ features.double().unsqueeze(-1)).squeeze(-1) + bias[tokens.long()].double(),)

    name = f"gather_outputs ({rows}, {vocabulary}), k = {k}, R = {rank}, {_short(dtype)}"
    return Case(name, make, lambda *inputs: (gather_outputs(*inputs),), truth)


def blend_case(device: torch.device, rows: int, vocabulary: int, dtype: torch.dtype) -> Case:
    """The blended rows and the exact KL."""

    def run(base: torch.Tensor, policy: torch.Tensor, asked: BlendRows) -> Tensors:
        workspace = make_blend_workspace(rows, vocabulary, device)
        return base, policy_blend(base, policy, asked, workspace).kl

    def truth(base: torch.Tensor, policy: torch.Tensor, asked: BlendRows) -> Tensors:
        chosen = base[asked.rows.long()].double()
        whole = base.double()
        whole[asked.rows.long()] = reference.blend_logits(chosen, [policy.double()], asked.above.double())
        return whole, reference.measure_kl(policy.double(), chosen)

    name = f"policy_blend ({rows}, {vocabulary}), {_short(dtype)} policy"
    return Case(name, lambda: _blend_inputs(device, rows, vocabulary, dtype), run, truth)


def head_blend_case(device: torch.device, rows: int, vocabulary: int, rank: int, gated: bool) -> Case:
    """Rows blended with a head, open and closed gates among them, the exact KL, and the sums and copies returned."""

    def make() -> tuple[Any, ...]:
        base, _, asked = _blend_inputs(device, rows, vocabulary, FP32)
        weight, bias = torch.randn(vocabulary, rank, device=device), torch.randn(vocabulary, device=device)
        features = torch.rand(rows, 1, device=device) * torch.randn(rows, rank, device=device) / rank**0.5
        if gated:
            kl = reference.head_blend(base.double(), features.double(), weight.double(), bias.double(), asked).kl
            # Halfway between two rows' own, so that rounding decides nothing.
            threshold = kl.sort().values[[rows // 2 - 1, rows // 2]].mean().float().expand(rows).contiguous()
            asked = replace(asked, threshold=threshold, below=asked.below.flip(1).contiguous())
        return base, features, weight, bias, asked

    def run(*inputs: Any) -> Tensors:
        base, features, weight, bias, asked = inputs
        workspace = make_head_workspace(rows, vocabulary, device)
        blended = head_blend(base, features, weight, bias, asked, workspace, gated=gated)
        return base, blended.kl, blended.guided, blended.base_total, blended.guided_total, blended.opened

    def truth(*inputs: Any) -> Tensors:
        whole, features, weight, bias = (tensor.double() for tensor in inputs[:4])
        exact = reference.head_blend(whole, features, weight, bias, inputs[4])
        return whole, exact.kl, exact.guided, exact.base_total, exact.guided_total, exact.opened

    name = f"head_blend ({rows}, {vocabulary}), R = {rank}, {'gated' if gated else 'ungated'}"
    return Case(name, make, run, truth)


def sampled_case(device: torch.device, rows: int, vocabulary: int, samples: int) -> Case:
    """The Monte Carlo estimate of the KL, which lies within six standard errors of the exact one."""

    def run(base: torch.Tensor, policy: torch.Tensor, asked: BlendRows) -> Tensors:
        chosen = base[asked.rows.long()].double()
        workspace = make_blend_workspace(rows, vocabulary, device)
        estimate = policy_blend(base, policy, asked, workspace, samples).estimate
        logprobs, ratio = policy.double().log_softmax(-1), policy.double().log_softmax(-1) - chosen.log_softmax(-1)
        kl = (logprobs.exp() * ratio).sum(-1)
        error = ((logprobs.exp() * (ratio - kl.unsqueeze(-1)) ** 2).sum(-1) / samples).sqrt()
        return ((estimate - kl).abs() < 6 * error,)

    def truth(*_: Any) -> Tensors:
        return (torch.ones(rows, dtype=torch.bool, device=device),)

    name = f"policy_blend ({rows}, {vocabulary}), {samples} samples"
    return Case(name, lambda: _blend_inputs(device, rows, vocabulary, FP32), run, truth, limit=0.0)


def _blend_inputs(device: torch.device, rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Any, ...]:
    coefficients = torch.tensor([[0.3, 0.7]], device=device).expand(rows, 2).contiguous()
    asked = BlendRows(
        torch.randperm(rows + 1, device=device)[:rows].int(), torch.full((rows,), -torch.inf, device=device),
        coefficients, coefficients, torch.randint(2**62, (rows,), device=device),
    )  # fmt: skip
    base, policy = (torch.randn(count, vocabulary, device=device) for count in (rows + 1, rows))
    return base, policy.to(dtype), asked


def attention_case(device: torch.device, sizes: Attended) -> Case:
    """What each fed token attends to, and the cache afterwards. Float32 is multiplied exactly, half precision as it is
    served: then the softmax's weights are rounded to it, and the result is."""
    fed, wide = 1 + sizes.k * sizes.branches, sizes.context // 16 + 1

    def make() -> tuple[Any, ...]:
        heads = [sizes.query_heads, sizes.heads, sizes.heads]
        fresh = torch.randn(sizes.rows, fed, sum(heads), sizes.width, device=device).to(sizes.dtype).transpose(1, 2)
        blocks = sizes.rows * wide + 3
        caches = (torch.randn(sizes.heads, blocks, 16, sizes.width, device=device).to(sizes.dtype) for _ in range(2))
        lengths = torch.randint(sizes.context, (sizes.rows,), device=device, dtype=torch.int32)
        lengths[-1], lengths[0] = -1, sizes.context - 1
        tables = torch.randperm(blocks, device=device)[: sizes.rows * wide].view(sizes.rows, wide)
        return *fresh.split(heads, dim=1), *caches, tables, lengths

    scale = sizes.width**-0.5

    attend = partial(candidate_attention, k=sizes.k, scale=scale, window=sizes.window, exact=sizes.dtype == FP32)

    def run(*inputs: torch.Tensor) -> Tensors:
        return attend(*inputs), inputs[3], inputs[4]

    def truth(*inputs: Any) -> Tensors:
        query, key, value, keys, values = (tensor.double() for tensor in inputs[:5])
        tables, lengths = inputs[5:]
        out = reference.candidate_attention(
            query, key, value, keys, values, tables, lengths, sizes.k, scale, sizes.window
        )
        return out, keys, values

    name = (
        f"candidate_attention B = {sizes.rows}, {sizes.query_heads}/{sizes.heads} heads of {sizes.width}, T = {fed}, "
        f"context {sizes.context}, {_short(sizes.dtype)}{f', window {sizes.window}' if sizes.window else ''}"
    )
    return Case(name, make, run, truth, 1e-5 if sizes.dtype == FP32 else torch.finfo(sizes.dtype).eps)


def _short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]
