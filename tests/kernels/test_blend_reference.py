"""Blending policies, KL and entropy against float64 written from the formulas."""

import random

import pytest
import torch

from steersman.kernels.reference import blend_logits, measure_entropy, measure_kl, sample_kl

VOCABULARIES = (7, 300, 4099)


@pytest.fixture(autouse=True)
def seed() -> int:
    value = random.randrange(2**31)
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_blend_is_the_normalised_product_of_powers(vocabulary: int) -> None:
    base, one, two = (3 * torch.randn(5, vocabulary) for _ in range(3))
    coefficients = torch.randn(5, 3)
    expected = torch.ones(5, vocabulary, dtype=torch.float64)
    for logits, weight in zip((base, one, two), coefficients.double().T, strict=True):
        expected = expected * logits.double().softmax(-1) ** weight.unsqueeze(-1)
    expected = expected / expected.sum(-1, keepdim=True)
    blended = blend_logits(base, [one, two], coefficients)
    torch.testing.assert_close(blended.double().softmax(-1), expected, rtol=1e-4, atol=1e-7)


def test_a_coefficient_of_zero_leaves_the_bases_bits_whatever_the_policy_says() -> None:
    base, policy = torch.randn(4, 300), torch.randn(4, 300)
    base[:, 5], policy[:, 7] = -torch.inf, -torch.inf
    blended = blend_logits(base, [policy], torch.tensor([[1.0, 0.0]]).expand(4, -1))
    assert torch.equal(blended, base)


def test_what_either_masks_stays_masked_also_under_negative_and_zero_coefficients() -> None:
    base, policy = torch.randn(3, 300), torch.randn(3, 300)
    base[:, :100], policy[:, 200:] = -torch.inf, -torch.inf
    for weights in ([1.0, 1.0], [0.0, 1.0], [1.0, -1.0], [2.0, -0.5]):
        blended = blend_logits(base, [policy], torch.tensor([weights]).expand(3, -1))
        assert bool((blended[:, :100] == -torch.inf).all())
        assert bool((blended[:, 200:] == -torch.inf).all())
        assert bool(blended[:, 100:200].isfinite().all())


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_kl_and_entropy_are_their_definitions(vocabulary: int) -> None:
    logits, base = 2 * torch.randn(6, vocabulary), 2 * torch.randn(6, vocabulary)
    p, q = logits.double().softmax(-1), base.double().softmax(-1)
    torch.testing.assert_close(measure_kl(logits, base).double(), (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(measure_entropy(base).double(), -(q * q.log()).sum(-1), rtol=1e-4, atol=1e-5)


def test_kl_and_entropy_are_taken_over_the_tokens_that_a_grammar_leaves() -> None:
    logits, base = torch.randn(4, 50), torch.randn(4, 50)
    masked = base.clone()
    masked[:, 10:] = -torch.inf
    torch.testing.assert_close(measure_kl(logits, masked), measure_kl(logits[:, :10], base[:, :10]))
    torch.testing.assert_close(measure_entropy(masked), measure_entropy(base[:, :10]))
    one = torch.full((1, 50), -torch.inf)
    one[0, 3] = 2.0
    assert float(measure_kl(torch.randn(1, 50), one)) == 0.0
    assert float(measure_entropy(one)) == 0.0


@pytest.mark.parametrize("samples", [1, 50, 1000])
def test_the_monte_carlo_kl_is_unbiased_and_as_uncertain_as_its_standard_error_says(samples: int) -> None:
    logits, base = 1.5 * torch.randn(1, 300), 1.5 * torch.randn(1, 300)
    p, q = logits.double().softmax(-1), base.double().softmax(-1)
    ratio = (p / q).log()
    exact = float((p * ratio).sum())
    deviation = float(((p * ratio.square()).sum() - exact**2).sqrt())
    seeds = 2000
    first = random.randrange(2**31)
    generators = [_generator(first + n) for n in range(seeds)]
    estimates = sample_kl(logits.expand(seeds, -1), base.expand(seeds, -1), samples, generators).double()
    # Five standard errors: wrongly failed once in two million; a bias of a fifth of one draw's deviation is found.
    assert abs(float(estimates.mean()) - exact) < 5 * deviation / (seeds * samples) ** 0.5
    assert float(estimates.std()) == pytest.approx(deviation / samples**0.5, rel=0.15)


def test_the_same_seed_gives_the_same_estimate_whatever_the_neighbours() -> None:
    logits, base = torch.randn(3, 300), torch.randn(3, 300)
    together = sample_kl(logits, base, 100, [_generator(n) for n in range(3)])
    for n in range(3):
        alone = sample_kl(logits[n : n + 1], base[n : n + 1], 100, [_generator(n)])
        assert float(alone) == pytest.approx(float(together[n]), abs=1e-6)


def _generator(seed: int) -> torch.Generator:
    """On the device where the tests' tensors are."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)
