"""The losses against formulas written out in float64."""

import math

import pytest
import torch

from steersman.training.objectives import bradley_terry


def reference(chosen: list[float], rejected: list[float], mask: list[bool]) -> float:
    """mean −log( e^c / (e^c + e^r) ), in Python's floats."""
    kept = [(c, r) for c, r, keep in zip(chosen, rejected, mask, strict=True) if keep]
    return sum(-math.log(math.exp(c) / (math.exp(c) + math.exp(r))) for c, r in kept) / len(kept)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_bradley_terry_equals_the_formula(seed: int, dtype: torch.dtype, tolerance: float) -> None:
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    pairs, prefixes = torch.randint(1, 6, (2,), generator=generator).tolist()
    chosen, rejected = (5 * torch.randn(2, pairs, prefixes, generator=generator)).to(dtype)
    mask = torch.rand(pairs, prefixes, generator=generator) < 0.7
    mask[0, 0] = True
    arguments = [tensor.double().flatten().tolist() for tensor in (chosen, rejected)]
    expected = reference(*arguments, mask.flatten().tolist())
    assert bradley_terry(chosen, rejected, mask).item() == pytest.approx(expected, rel=tolerance, abs=tolerance)
    expected = reference(*arguments, [True] * mask.numel())
    assert bradley_terry(chosen, rejected).item() == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_bradley_terry_depends_on_the_difference_only_and_counts_a_tie_as_log_two() -> None:
    chosen, rejected = torch.tensor([1.0, 3.0]), torch.tensor([0.5, -2.0])
    shifted = bradley_terry(chosen + 7, rejected + 7)
    torch.testing.assert_close(shifted, bradley_terry(chosen, rejected))
    assert bradley_terry(chosen, chosen).item() == pytest.approx(math.log(2))


def test_bradley_terry_is_finite_where_the_scores_are_far_apart() -> None:
    loss = bradley_terry(torch.tensor([-500.0, 500.0]), torch.tensor([500.0, -500.0]))
    assert loss.item() == pytest.approx(500.0)


def test_padding_neither_counts_nor_gets_a_gradient() -> None:
    chosen = torch.tensor([[1.0, float("nan")]], requires_grad=True)
    rejected = torch.tensor([[0.0, 2.0]])
    loss = bradley_terry(chosen, rejected, torch.tensor([[True, False]]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert chosen.grad is not None
    assert chosen.grad[0, 0] < 0
    assert chosen.grad[0, 1] == 0


def test_gradient() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 4) < 0.6
    assert torch.autograd.gradcheck(lambda scores: bradley_terry(*scores, mask), scores)
