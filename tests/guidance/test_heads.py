"""A head's outputs: the formula's in float64, for all tokens or a few, in whatever precision hidden states come."""

import random

import pytest
import torch

from steersman.guidance.heads import (
    FrozenHead,
    Head,
    HeadShape,
    build_head,
    count_parameters,
    describe_shape,
    fold_standardisation,
)
from tests.support.gpu_runtime import acting_as_gpu

SHAPE = HeadShape(hidden_size=20, width=14, rank=6, vocabulary=90)


@pytest.fixture
def head(rng: random.Random) -> Head:
    """None of its parameters is 0."""
    head = Head(SHAPE)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.5)
    return head


def reference(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    """U f(h) + c with f(h) = W₂ silu(W₁ h + b₁) + b₂ in float64, row by row."""
    own = {name: tensor.double() for name, tensor in head.state_dict().items()}
    rows = []
    for h in hidden.double().reshape(-1, hidden.shape[-1]):
        middle = own["inner.weight"] @ h + own["inner.bias"]
        features = own["outer.weight"] @ (middle / (1 + torch.exp(-middle))) + own["outer.bias"]
        rows.append(own["tokens"] @ features + own["bias"])
    return torch.stack(rows).reshape(*hidden.shape[:-1], -1)


@pytest.mark.parametrize("shape", [(5,), (2, 3), ()], ids=str)
def test_outputs_are_the_formulas_in_float64(head: Head, shape: tuple[int, ...]) -> None:
    hidden = torch.randn(*shape, SHAPE.hidden_size)
    torch.testing.assert_close(head(hidden).double(), reference(head, hidden), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_outputs_are_float32_whatever_the_precision_of_the_hidden_states(head: Head, dtype: torch.dtype) -> None:
    hidden = torch.randn(4, SHAPE.hidden_size).to(dtype)
    for outputs in (head(hidden), head.every(head.features(hidden)), _of_frozen(head, hidden)):
        assert outputs.dtype == torch.float32
        torch.testing.assert_close(outputs.double(), reference(head, hidden), rtol=0, atol=1e-5)


def test_a_frozen_head_has_the_same_outputs_without_gradients(head: Head) -> None:
    frozen, hidden = FrozenHead(head, "cpu"), torch.randn(7, SHAPE.hidden_size)
    features = frozen.features(hidden)
    torch.testing.assert_close(frozen.every(features), head(hidden), rtol=0, atol=1e-5)
    assert not features.requires_grad
    assert (frozen.shape, frozen.vocabulary, frozen.size) == (head.shape, 90, 4 * count_parameters(SHAPE))


def test_on_a_device_with_kernels_f_is_padded_with_zeros_and_outputs_are_the_same(head: Head) -> None:
    """Rows of 16 numbers can be read 16 bytes at a time."""
    with acting_as_gpu():
        frozen = FrozenHead(head, "cpu")
    hidden = torch.randn(7, SHAPE.hidden_size)
    features = frozen.features(hidden)
    assert features.shape == (7, 16)
    assert not features[:, SHAPE.rank :].any()
    torch.testing.assert_close(frozen.every(features), head(hidden), rtol=0, atol=1e-5)
    added = (16 - SHAPE.rank) * (SHAPE.width + 1 + SHAPE.vocabulary)
    assert (frozen.shape, frozen.size) == (head.shape, 4 * (count_parameters(SHAPE) + added))


def test_a_head_in_half_precision_is_frozen_in_float32(head: Head) -> None:
    half, hidden = head.bfloat16(), torch.randn(3, SHAPE.hidden_size)
    torch.testing.assert_close(_of_frozen(half, hidden).double(), reference(half, hidden), rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 7, SHAPE.vocabulary])
def test_outputs_of_a_few_tokens_are_those_among_all(head: Head, k: int) -> None:
    hidden = torch.randn(5, SHAPE.hidden_size)
    tokens = torch.stack([torch.randperm(SHAPE.vocabulary)[:k] for _ in range(5)])
    for layer in (head, FrozenHead(head, "cpu")):
        features = layer.features(hidden)
        expected = layer.every(features).gather(1, tokens)
        torch.testing.assert_close(layer.at(features, tokens), expected, rtol=0, atol=1e-5)


def test_a_token_that_is_wanted_twice_has_its_output_twice(head: Head) -> None:
    features = head.features(torch.randn(2, SHAPE.hidden_size))
    outputs = head.at(features, torch.tensor([[8, 3, 8], [89, 0, 89]]))
    assert torch.equal(outputs[:, 0], outputs[:, 2])


def test_a_value_of_the_prefix_is_a_column_of_ones(head: Head) -> None:
    """What is the same for every token moves every output alike."""
    hidden = torch.randn(3, SHAPE.hidden_size)
    before = head(hidden)
    with torch.no_grad():
        head.tokens[:, 2] = 1.0
    without = head(hidden)
    with torch.no_grad():
        head.outer.bias[2] += 0.75
    torch.testing.assert_close(head(hidden), without + 0.75)
    assert not torch.allclose(before, without)


def test_a_layer_trained_on_standardised_states_takes_them_as_they_are(head: Head) -> None:
    hidden = 3 * torch.randn(50, SHAPE.hidden_size) + torch.randn(SHAPE.hidden_size)
    mean, deviation = hidden.mean(dim=0), 0.1 + hidden.std(dim=0)
    expected = head((hidden - mean) / deviation).detach()
    fold_standardisation(head.inner, mean, deviation)
    torch.testing.assert_close(head(hidden), expected, rtol=0, atol=1e-4)


def test_a_head_is_built_again_of_its_own_tensors(head: Head) -> None:
    built = build_head({name: tensor.bfloat16() for name, tensor in head.state_dict().items()})
    assert built.shape == SHAPE
    assert not any(parameter.requires_grad for parameter in built.parameters())
    assert not built.training
    for name, tensor in built.state_dict().items():
        assert torch.equal(tensor, head.state_dict()[name].bfloat16().float())


@pytest.mark.parametrize("name", ["inner.weight", "inner.bias", "outer.weight", "outer.bias", "tokens", "bias"])
def test_tensors_that_do_not_fit_one_another_build_no_head(head: Head, name: str) -> None:
    own = head.state_dict()
    with pytest.raises((KeyError, ValueError)):
        build_head({other: tensor for other, tensor in own.items() if other != name})
    with pytest.raises(ValueError, match=r"is \[|not enough|too many|expected"):
        build_head({**own, name: own[name][:-1].clone()})
    with pytest.raises(ValueError, match="extra"):
        build_head({**own, "extra": torch.zeros(1)})


def test_users_are_shown_the_rank_and_the_number_of_parameters(head: Head) -> None:
    parameters = sum(parameter.numel() for parameter in head.parameters())
    assert count_parameters(SHAPE) == parameters
    assert describe_shape(SHAPE) == {"rank": 6, "parameters": parameters}


def _of_frozen(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    frozen = FrozenHead(head, "cpu")
    return frozen.every(frozen.features(hidden))
