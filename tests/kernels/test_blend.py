"""Rows blended with a policy behind a KL gate: Triton's interpreter and the torch twin against float64."""

from collections.abc import Callable

import pytest
import torch

from steersman.kernels import reference
from steersman.kernels.arguments import Blended, BlendRows
from steersman.kernels.blend import make_workspace, policy_blend
from tests.kernels.poison import poisoned_memory

VOCABULARIES = (300, 4099, 8192, 50257)
ROWS = (3, 0, -1, 5)


def _triton(base: torch.Tensor, policy: torch.Tensor, asked: BlendRows, samples: int = 0) -> Blended:
    with poisoned_memory():
        workspace = make_workspace(len(policy) + 1, policy.shape[1], base.device)
        return policy_blend(base, policy, asked, workspace, samples)


BLENDS: dict[str, Callable[..., Blended]] = {"triton": _triton, "twin": reference.policy_blend}


def _asked(threshold: torch.Tensor, above: list[list[float]], below: list[list[float]]) -> BlendRows:
    lines = len(threshold)
    rows = torch.tensor(ROWS[:lines], dtype=torch.int32)
    seeds = torch.randint(2**62, (lines,))
    return BlendRows(rows, threshold.float(), torch.tensor(above), torch.tensor(below), seeds)


def _exact(base: torch.Tensor, policy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(policy‖base) of each line over the tokens that neither masks, and the variance of one sample's log-ratio."""
    kls, variances = [], []
    for row, logits in zip(ROWS, policy.double(), strict=False):
        both = (logits > -torch.inf) & (base[max(row, 0)] > -torch.inf)
        p = logits[both].softmax(-1)
        ratio = p.log() - base[max(row, 0)].double()[both].log_softmax(-1)
        kls.append((p * ratio).sum())
        variances.append((p * (ratio - kls[-1]) ** 2).sum())
    return torch.stack(kls), torch.stack(variances)


def _blended(base: torch.Tensor, policy: torch.Tensor, weights: list[float]) -> torch.Tensor:
    """c₀ base + c₁ policy in float64, masked where the base is or a policy that counts is."""
    masked = (base == -torch.inf) | ((policy == -torch.inf) & (weights[1] != 0))
    first, second = (x.double().masked_fill(x == -torch.inf, 0.0) for x in (base, policy))
    return (weights[0] * first + weights[1] * second).masked_fill(masked, -torch.inf)


@pytest.mark.parametrize("name", BLENDS)
@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [*((v, torch.float32) for v in VOCABULARIES), (300, torch.bfloat16), (300, torch.float16), (4099, torch.bfloat16)],
    ids=str,
)
def test_the_exact_kl_decides_and_the_row_is_blended(name: str, vocabulary: int, dtype: torch.dtype) -> None:
    base, policy = 2 * torch.randn(6, vocabulary), (2 * torch.randn(4, vocabulary)).to(dtype)
    base[3, ::3], policy[1, 1::5] = -torch.inf, -torch.inf
    before = base.clone()
    kl, _ = _exact(base, policy)
    above, below = [[0.3, 0.7], [0.3, 0.7], [0.5, 0.5], [1.5, -0.5]], [[0.0, 1.0]] * 4
    asked = _asked(kl + torch.tensor([-0.1, 0.1, 0.1, -0.1]), above, below)
    result = BLENDS[name](base, policy, asked)
    torch.testing.assert_close(result.kl.double(), kl, rtol=1e-5, atol=1e-5)
    assert torch.equal(result.estimate, result.kl)
    assert result.opened.tolist() == [1, 0, 0, 1]
    for line, (row, weights) in enumerate(zip(ROWS, [above[0], below[1], None, above[3]], strict=True)):
        if weights is not None:
            expected = _blended(before[row], policy[line], weights)
            torch.testing.assert_close(base[row].double(), expected, rtol=1e-5, atol=2e-5)
    for row in (1, 2, 4):
        assert torch.equal(base[row], before[row])


@pytest.mark.parametrize("name", BLENDS)
def test_a_row_whose_choice_is_the_base_keeps_its_bits(name: str) -> None:
    base, policy = torch.randn(6, 4099), torch.randn(4, 4099)
    policy[0] = -torch.inf
    before = base.clone()
    asked = _asked(torch.full((4,), 1e6), [[0.0, 1.0]] * 4, [[1.0, 0.0]] * 4)
    result = BLENDS[name](base, policy, asked)
    assert result.opened.tolist() == [0] * 4
    assert torch.equal(base, before)


@pytest.mark.parametrize("name", BLENDS)
@pytest.mark.parametrize("broken", ["NaN in the policy", "nothing in common"])
def test_a_row_without_a_kl_is_not_open_and_keeps_its_bits(name: str, broken: str) -> None:
    base, policy = torch.randn(6, 4099), torch.randn(4, 4099)
    if broken == "NaN in the policy":
        policy[1, 77] = torch.nan
    else:
        base[0, 2000:], policy[1, :2000] = -torch.inf, -torch.inf
    before = base.clone()
    asked = _asked(torch.full((4,), -torch.inf), [[0.5, 0.5]] * 4, [[0.0, 1.0]] * 4)
    result = BLENDS[name](base, policy, asked)
    assert result.opened.tolist() == [1, 0, 1, 1]
    assert bool(result.kl[1].isnan())
    assert torch.equal(base[0], before[0])
    assert bool(base[[3, 5]].isfinite().all())


@pytest.mark.parametrize("name", BLENDS)
@pytest.mark.parametrize("vocabulary", [300, 8192])
def test_samples_estimate_the_kl_without_bias(name: str, vocabulary: int) -> None:
    """Thirty estimates of 300 draws: their mean deviates by five standard errors once in two million runs, and draws of
    the base instead of the policy would be off by hundreds; a spread outside of these bounds is as unlikely."""
    base, policy = torch.randn(6, vocabulary), torch.randn(1, vocabulary)
    base[3, ::4], policy[0, 1::4] = -torch.inf, -torch.inf
    kl, variance = _exact(base, policy)
    whole = torch.tensor([[1.0, 0.0]]).expand(30, 2).contiguous()
    asked = BlendRows(
        torch.full((30,), 3, dtype=torch.int32), torch.zeros(30), whole, whole, torch.randint(2**62, (30,))
    )
    drawn = BLENDS[name](base, policy.expand(30, -1), asked, 300).estimate.double()
    deviation = (drawn.mean() - kl) / (variance / (300 * 30)).sqrt()
    assert abs(float(deviation)) < 5, float(deviation)
    spread = float(drawn.var() / (variance / 300))
    assert 0.2 < spread < 2.8, "the draws of one estimate are not independent"


def test_the_samples_depend_on_the_row_s_seed_alone() -> None:
    base, policy = torch.randn(6, 4099), torch.randn(4, 4099)
    base[1], policy[3] = base[0], policy[1]
    seeds = torch.tensor([5, 6, 7, 6])
    rows = torch.tensor([3, 0, 2, 1], dtype=torch.int32)
    whole = torch.tensor([[1.0, 0.0]] * 4)
    asked = BlendRows(rows, torch.zeros(4), whole, whole, seeds)
    together = _triton(base, policy, asked, 100).estimate
    assert together[1] == together[3]
    assert len(set(together.tolist())) == 3
    alone = BlendRows(rows[1:2], torch.zeros(1), whole[:1], whole[:1], seeds[1:2])
    assert _triton(base, policy[1:2], alone, 100).estimate[0] == together[1]


@pytest.mark.parametrize("name", BLENDS)
def test_the_estimate_decides_where_samples_are_asked_for(name: str) -> None:
    base, policy = torch.randn(6, 300), torch.randn(4, 300)
    before = base.clone()
    low = _asked(torch.full((4,), 0.0), [[0.0, 1.0]] * 4, [[1.0, 0.0]] * 4)
    estimate = BLENDS[name](before.clone(), policy, low, 50).estimate
    threshold = estimate + torch.tensor([-1e-3, 1e-3, 0.0, -1e-3])
    asked = BlendRows(low.rows, threshold, low.above, low.below, low.seeds)
    result = BLENDS[name](base, policy, asked, 50)
    assert torch.equal(result.estimate, estimate)
    assert result.opened[[0, 1, 3]].tolist() == [1, 0, 1]
    assert torch.equal(base[0], before[0])
    assert torch.equal(base[5], policy[3])


def test_rows_with_room_between_them_and_bad_arguments() -> None:
    wide, policies = torch.randn(6, 4128), torch.randn(4, 4128)
    base, policy, beside = wide[:, :4099], policies[:, :4099], wide[:, 4099:].clone()
    before = base.clone()
    asked = _asked(torch.full((4,), -torch.inf), [[0.5, 0.5]] * 4, [[1.0, 0.0]] * 4)
    _triton(base, policy, asked)
    torch.testing.assert_close(base[3].double(), _blended(before[3], policy[0], [0.5, 0.5]), rtol=1e-5, atol=1e-5)
    assert torch.equal(wide[:, 4099:], beside)
    for samples in (-1, 1025):
        with pytest.raises(ValueError, match=r"samples: .* is not between 0 and 1024"):
            _triton(base, policy, asked, samples)
    with pytest.raises(ValueError, match="policy: the stride"):
        _triton(base, policy.T.contiguous().T, asked)
