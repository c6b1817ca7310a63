"""The launches that are compiled before a request comes, and what makes two of them one."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from steersman.kernels import head_rerank, rerank, topk
from steersman.kernels.arguments import HeadReranked, HeadRows, HeadWeights, RewardTerms
from steersman.kernels.launch import Launch
from steersman.kernels.production import (
    distinct_launches,
    head_rerank_launches,
    production_launches,
    sampling_launches,
)


def _topk(rows: int, vocabulary: int, k: int, stride: int | None = None) -> list[Launch]:
    logits = torch.empty(rows, stride or vocabulary)[:, :vocabulary]
    out = torch.empty(rows, k, dtype=torch.int32), torch.empty(rows, k), torch.empty(rows)
    return topk.plan_launches(logits, k, topk.make_workspace(rows, vocabulary, logits.device), *out)


def _rerank(rows: int, vocabulary: int, k: int, terms: int) -> Launch:
    ids, numbers = torch.empty(rows, k, dtype=torch.int64), torch.empty(rows, terms)
    asked = RewardTerms(numbers, numbers, numbers, torch.empty(rows, terms, dtype=torch.int32))
    scores, rewards = torch.empty(rows, k), torch.empty(rows, terms, k)
    return rerank.plan_launch(torch.empty(rows, vocabulary), ids[:, 0].clone(), ids, scores, asked, rewards, scores)


def _head_rerank(rows: int, vocabulary: int, k: int, ranks: list[int], limited: bool, stride: int) -> list[Launch]:
    with torch.device("meta"):
        none, terms = torch.empty(0), torch.empty(rows, len(ranks))
        heads = [
            HeadWeights(none, none, none, none, torch.empty(vocabulary, rank), torch.empty(vocabulary))
            for rank in ranks
        ]
        index = torch.empty(rows, dtype=torch.int64)
        asked = HeadRows(
            index, k, index.unsqueeze(1) if limited else None, heads,
            RewardTerms(terms, terms, terms, terms.int()), torch.empty(len(ranks), 6, dtype=torch.int64),
        )  # fmt: skip
        each = torch.empty(rows, k)
        done = HeadReranked(each.long(), each, each, each, torch.empty(rows, len(ranks), k), index.bool())
        workspace = head_rerank.make_workspace(rows, vocabulary, torch.device("meta"))
        logits, features = torch.empty(rows, stride)[:, :vocabulary], torch.empty(rows, sum(ranks))
        return head_rerank.plan_launches(logits, features, asked, workspace, done)


@pytest.mark.parametrize("vocabulary", [300, 8_192, 32_000, 50_257, 151_936, 262_144])
def test_every_size_of_a_step_of_reward_heads_is_among_the_compiled_ones(vocabulary: int) -> None:
    compiled = {launch.variant for launch in head_rerank_launches(torch.float32, 160, vocabulary).values()}
    for rows in (1, 3, 16, 100, 300):
        for k in (1, 10, 33, 64):
            for ranks, limited in (([160], False), ([16], True), ([128, 48, 16], True), ([144] * 8, False)):
                for stride in (vocabulary, -(-vocabulary // 64) * 64):
                    launches = _head_rerank(rows, vocabulary, k, ranks, limited, stride)
                    assert {launch.variant for launch in launches} <= compiled


@pytest.mark.parametrize("vocabulary", [300, 320, 32_000, 50_257, 128_256])
def test_every_size_of_a_sampling_step_is_among_the_compiled_ones(vocabulary: int) -> None:
    compiled = {launch.variant for launch in sampling_launches(vocabulary).values()}
    for rows in (1, 3, 16, 200):
        for k in (1, 7, 10, 33, 64):
            launches = [*_topk(rows, vocabulary, k), *(_rerank(rows, vocabulary, k, terms) for terms in (1, 2, 8))]
            padded = _topk(rows, vocabulary, k, stride=-(-vocabulary // 64) * 64)
            assert {launch.variant for launch in (*launches, *padded)} <= compiled


def test_a_variant_is_what_triton_compiles_a_kernel_for() -> None:
    (scan, _), launch = _topk(3, 320, 10), _rerank(3, 320, 10, 2)
    assert _topk(5, 320, 10)[0].variant == scan.variant
    for vocabulary, stride in ((321, 336), (320, 321)):
        assert _topk(3, vocabulary, 10, stride)[0].variant != scan.variant
    assert _rerank(3, 320, 10, 7).variant == launch.variant
    assert _rerank(3, 320, 17, 2).variant != launch.variant
    half = {**launch.arguments, "logits": torch.empty(3, 320, dtype=torch.bfloat16)}
    assert dataclasses.replace(launch, arguments=half).variant != launch.variant
    odd = {**launch.arguments, "rewards": torch.empty(61)[1:].view(3, 2, 10)}
    assert dataclasses.replace(launch, arguments=odd).variant != launch.variant
    assert dataclasses.replace(launch, warps=2).variant != launch.variant
    assert dataclasses.replace(launch, registers=96).variant != launch.variant


def test_a_variant_is_compiled_once() -> None:
    launches = production_launches()
    distinct = distinct_launches(launches)
    assert {launch.variant for launch in distinct.values()} == {launch.variant for launch in launches.values()}
    assert len({launch.variant for launch in distinct.values()}) == len(distinct) < len(launches)


_AS_TRITON_DOES = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from steersman.kernels.production import head_rerank_launches, production_launches, sampling_launches

launches = [*production_launches().values(), *sampling_launches(320).values(), *sampling_launches(50_257).values()]
launches += head_rerank_launches(torch.float32, 160, 50_257).values()
backend = make_backend(GPUTarget("cuda", 90, 32))
own, theirs = [], []
for launch in launches:
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    own.append(launch.variant)
    theirs.append((launch.kernel.fn.__name__, str(bind(**launch.arguments, **launch.choices, **launch.options)[1:])))
pairs = set(zip(own, theirs, strict=True))
assert len(pairs) == len(set(own)) == len(set(theirs)) > 80
"""


def test_variants_are_told_apart_as_triton_tells_them_apart() -> None:
    """In a process of its own: here kernels are bound to the interpreter, which specialises nothing."""
    run = subprocess.run([sys.executable, "-c", _AS_TRITON_DOES], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
