"""The losses against formulas written out in float64."""

import math

import pytest
import torch

from steersman.training.rewards.losses import bradley_terry, distillation, regression


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


@pytest.fixture
def generator() -> torch.Generator:
    seed = int(torch.randint(2**31, ()))
    print("seed", seed)
    return torch.Generator().manual_seed(seed)


def test_strength_and_label_smoothing_equal_the_formula(generator: torch.Generator) -> None:
    chosen, rejected = 3 * torch.randn(2, 7, generator=generator, dtype=torch.float64)
    strength = 1 + 3 * torch.rand(7, generator=generator, dtype=torch.float64)
    mask = torch.tensor([True] * 5 + [False] * 2)
    expected = 0.0
    for c, r, m in list(zip(chosen.tolist(), rejected.tolist(), strength.tolist(), strict=True))[:5]:
        right = 1 / (1 + math.exp(r - c))
        expected -= m * (0.9 * math.log(right) + 0.1 * math.log(1 - right)) / 5
    found = bradley_terry(chosen, rejected, mask, strength=strength, label_smoothing=0.1)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_with_labels_that_are_half_wrong_nothing_is_learned(generator: torch.Generator) -> None:
    scores = torch.randn(2, 4, generator=generator, requires_grad=True)
    loss = bradley_terry(*scores, label_smoothing=0.5)
    assert loss.item() >= math.log(2)
    tied = torch.zeros(2, 4, requires_grad=True)
    bradley_terry(*tied, label_smoothing=0.5).backward()
    assert torch.all(tied.grad == 0)


def test_regression_equals_the_formula(generator: torch.Generator) -> None:
    scores, ratings = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 5, generator=generator) < 0.6
    mask[0, 0] = True
    kept = [(s, r) for s, r, m in zip(*(t.flatten().tolist() for t in (scores, ratings, mask)), strict=True) if m]
    assert regression(scores, ratings, mask).item() == pytest.approx(sum((s - r) ** 2 for s, r in kept) / len(kept))


def test_distillation_equals_the_formula_and_ignores_a_constant(generator: torch.Generator) -> None:
    scores, taught = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True])
    expected = 0.0
    for row in (0, 2, 3):
        own, other = scores[row].tolist(), taught[row].tolist()
        own_mean, other_mean = sum(own) / 6, sum(other) / 6
        expected += sum(((a - own_mean) - (b - other_mean)) ** 2 for a, b in zip(own, other, strict=True)) / 18
    assert distillation(scores, taught, mask).item() == pytest.approx(expected, rel=1e-12)
    batched = distillation(scores[mask].view(1, 3, 6), taught[mask].view(1, 3, 6))
    assert batched.item() == pytest.approx(expected, rel=1e-12)
    shifted = taught + torch.randn(4, 1, generator=generator, dtype=torch.float64)
    assert distillation(scores, shifted, mask).item() == pytest.approx(expected, rel=1e-12)


def test_gradients_of_the_others(generator: torch.Generator) -> None:
    scores = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    strength = 1 + torch.rand(3, 4, generator=generator, dtype=torch.float64)
    other = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: bradley_terry(*s, strength=strength, label_smoothing=0.2), scores)
    assert torch.autograd.gradcheck(lambda s: regression(s[0], other), scores)
    assert torch.autograd.gradcheck(lambda s: distillation(s[0], other), scores)
