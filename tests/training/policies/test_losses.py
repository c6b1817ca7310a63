"""Two-dimensional and token-level DPO against the papers' formulas, written out in Python's floats."""

import math

import pytest
import torch

from steersman.training.policies.losses import Segments, sequential_kl, token_level_dpo, two_dimensional_dpo

WEIGHTS = (0.3, 0.4, 0.1, 0.1, 0.1)
"""2D-DPO's, of helpfulness, correctness, safety, completeness and clarity."""

Side = tuple[list[float], list[list[float]]]
"""Of one response: its segments' summed log-ratios, and their scores of every aspect."""


def reference_two_dimensional(pairs: list[tuple[Side, Side]], beta: float, weights: tuple[float, ...]) -> float:
    """One pair at a time, one term at a time."""
    total = 0.0
    for chosen, rejected in pairs:
        sides = []
        for (ratios, scores), best_first in ((chosen, True), (rejected, False)):
            rewards = [sum(w * (s / 4 + 1) for w, s in zip(weights, aspects, strict=True)) for aspects in scores]
            order = sorted(range(len(rewards)), key=lambda n: round(rewards[n], 6) * (-1 if best_first else 1))
            sides.append([(rewards[n], ratios[n]) for n in order])
        count = min(map(len, sides))
        best, worst = sides[0][:count], sides[1][:count]
        own_beta = beta / (sum(r for r, _ in best + worst) / (2 * count))
        for (r_w, ratio_w), (r_l, ratio_l) in zip(best, worst, strict=True):
            total += math.log(1 + math.exp(-own_beta * (r_w * ratio_w - r_l * ratio_l)))
    return total / len(pairs)


def stack(sides: list[Side]) -> Segments:
    """A padded batch, with NaN where nothing is."""
    widest = max(len(ratios) for ratios, _ in sides) + 1
    ratios = torch.full((len(sides), widest), torch.nan, dtype=torch.float64)
    scores = torch.full((len(sides), widest, 5), torch.nan, dtype=torch.float64)
    mask = torch.zeros(len(sides), widest, dtype=torch.bool)
    for row, (own, aspects) in enumerate(sides):
        ratios[row, : len(own)] = torch.tensor(own, dtype=torch.float64)
        scores[row, : len(own)] = torch.tensor(aspects, dtype=torch.float64)
        mask[row, : len(own)] = True
    return Segments(ratios, scores, mask)


def loss_of(pairs: list[tuple[Side, Side]], beta: float, weights: tuple[float, ...] = WEIGHTS) -> torch.Tensor:
    return two_dimensional_dpo(stack([c for c, _ in pairs]), stack([r for _, r in pairs]), beta, weights)


@pytest.fixture
def generator() -> torch.Generator:
    seed = int(torch.randint(2**31, ()))
    print("seed", seed)
    return torch.Generator().manual_seed(seed)


def random_side(generator: torch.Generator, segments: int) -> Side:
    """Whole scores, so that there are ties."""
    scores = torch.randint(5, (segments, 5), generator=generator).double().tolist()
    return torch.randn(segments, generator=generator, dtype=torch.float64).mul(3).tolist(), scores


@pytest.mark.parametrize("weights", [WEIGHTS, (1.0, 0.0, 0.0, 0.0, 0.0)], ids=["2D", "1D"])
def test_two_dimensional_equals_the_formula_for_any_number_of_segments(
    generator: torch.Generator, weights: tuple[float, ...]
) -> None:
    for _ in range(20):
        counts = torch.randint(1, 6, (3, 2), generator=generator).tolist()
        pairs = [(random_side(generator, w), random_side(generator, r)) for w, r in counts]
        expected = reference_two_dimensional(pairs, 0.2, weights)
        assert loss_of(pairs, 0.2, weights).item() == pytest.approx(expected, rel=1e-10)


def test_the_weights_are_the_papers_unless_others_are_given(generator: torch.Generator) -> None:
    pairs = [(random_side(generator, 3), random_side(generator, 3))]
    chosen, rejected = (stack(list(side)) for side in zip(*pairs, strict=True))
    found = two_dimensional_dpo(chosen, rejected, 0.2)
    assert found.item() == pytest.approx(reference_two_dimensional(pairs, 0.2, WEIGHTS), rel=1e-10)


def test_two_dimensional_on_paper() -> None:
    """Chosen: three segments of helpfulness 4, 0 and 4, all else 0; rejected: two, of 2 and 0. With weights on
    helpfulness alone r = 2, 1, 2 and 1.5, 1. N = 2. Best of the chosen: the first and the third, a tie that the
    earlier wins. Worst of the rejected: the second, then the first. Mean of the selected (2 + 2 + 1 + 1.5) / 4 =
    1.625, so β' = 0.325 / 1.625 = 0.2. Terms: 0.2 (2 · 1 − 1 · 4) = −0.4 and 0.2 (2 · 3 − 1.5 · 2) = 0.6.
    """
    chosen = [1.0, 9.0, 3.0], [[4.0, 0, 0, 0, 0], [0.0, 0, 0, 0, 0], [4.0, 0, 0, 0, 0]]
    rejected = [2.0, 4.0], [[2.0, 0, 0, 0, 0], [0.0, 0, 0, 0, 0]]
    expected = math.log(1 + math.exp(0.4)) + math.log(1 + math.exp(-0.6))
    assert loss_of([(chosen, rejected)], 0.325, (1.0, 0, 0, 0, 0)).item() == pytest.approx(expected)


def test_a_single_segment_is_dpo_with_its_rewards_in_proportion() -> None:
    equal = [[2.0] * 5]
    pair = (([1.5], equal), ([-0.5], equal))
    assert loss_of([pair], 0.2).item() == pytest.approx(math.log(1 + math.exp(-0.2 * 2.0)))


def test_what_is_not_there_reaches_no_gradient(generator: torch.Generator) -> None:
    pairs = [
        (random_side(generator, 2), random_side(generator, 4)),
        (random_side(generator, 5), random_side(generator, 1)),
    ]
    chosen, rejected = stack([c for c, _ in pairs]), stack([r for _, r in pairs])
    for side in (chosen, rejected):
        side.ratios.requires_grad_()
    two_dimensional_dpo(chosen, rejected, 0.3).backward()
    for side in (chosen, rejected):
        assert side.ratios.grad is not None
        assert torch.all(side.ratios.grad[~side.mask] == 0)
    assert [int((g != 0).sum()) for g in (chosen.ratios.grad, rejected.ratios.grad)] == [3, 3]


def test_gradient_of_two_dimensional(generator: torch.Generator) -> None:
    chosen, rejected = (stack([random_side(generator, 3), random_side(generator, 2)]) for _ in range(2))
    there = [torch.nan_to_num(side.ratios).requires_grad_() for side in (chosen, rejected)]

    def loss(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return two_dimensional_dpo(
            Segments(left, chosen.scores, chosen.mask), Segments(right, rejected.scores, rejected.mask), 0.2
        )

    assert torch.autograd.gradcheck(loss, tuple(there))


@pytest.mark.parametrize("version", [1, 2])
def test_token_level_equals_the_formula(generator: torch.Generator, version: int) -> None:
    ratios = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    kls = torch.rand(2, 6, generator=generator, dtype=torch.float64)
    expected = 0.0
    for w, l, d_w, d_l in zip(*ratios.tolist(), *kls.tolist(), strict=True):
        delta = 0.1 * (d_l - d_w) if version == 1 else 0.5 * (0.1 * d_l - 0.1 * d_w)
        expected += math.log(1 + math.exp(-(0.1 * (w - l) - delta))) / 6
    found = token_level_dpo(*ratios, *kls, beta=0.1, alpha=0.5, version=version)  # type: ignore[arg-type]
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_version_two_lets_no_gradient_through_the_chosen_kl(generator: torch.Generator) -> None:
    values = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    token_level_dpo(*values, beta=0.2, alpha=0.5, version=2).backward()
    assert values.grad is not None
    assert torch.all(values.grad[2] == 0)
    assert torch.all(values.grad[[0, 1, 3]] != 0)
    assert torch.autograd.gradcheck(lambda v: token_level_dpo(*v, beta=0.2, alpha=0.5, version=1), values)


def test_sequential_kl_equals_the_formula(generator: torch.Generator) -> None:
    reference, policy = 2 * torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    expected = []
    for row in range(2):
        total = 0.0
        for t in range(3):
            if mask[row, t]:
                p, q = ([math.exp(v) for v in side[row, t].tolist()] for side in (reference, policy))
                total += sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
        expected.append(total)
    assert sequential_kl(reference, policy, mask).tolist() == pytest.approx(expected, rel=1e-12)
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: sequential_kl(reference, logits, mask), policy)
