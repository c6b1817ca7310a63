"""Rows mixed with a policy that is a head on the base's hidden state: Triton's interpreter and the torch twin against
float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from steersman.kernels import reference
from steersman.kernels.arguments import BlendedRows, BlendRows
from steersman.kernels.head_blend import head_blend, make_workspace
from tests.kernels.poison import poisoned_memory

PLACES = (3, 0, -1, 5)


@dataclass
class Case:
    """Four lines over six rows of logits, in random order and with a line for nobody."""

    logits: torch.Tensor
    features: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    asked: BlendRows

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, BlendRows]:
        return self.logits, self.features, self.weight, self.bias, self.asked

    def policy(self) -> torch.Tensor:
        """Logits [lines, V] of the policy in float64; -inf where the base or the policy masks a token."""
        outputs = self.features.double() @ self.weight.double().t() + self.bias.double()
        width = self.logits.shape[1]
        padded = torch.full((len(outputs), width), -torch.inf, dtype=torch.float64)
        padded[:, : outputs.shape[1]] = outputs[:, :width]
        return self.base().double() + padded

    def base(self) -> torch.Tensor:
        """The lines' rows as they are now; a line for nobody is masked."""
        rows = self.asked.rows
        return torch.stack(
            [self.logits[row] if row >= 0 else torch.full_like(self.logits[0], -torch.inf) for row in rows]
        )

    def kl(self) -> torch.Tensor:
        """KL(policy‖base) of each line over the tokens that neither masks."""
        kls = []
        for p, q in zip(self.policy(), self.base().double(), strict=True):
            both = p > -torch.inf
            own = p[both].log_softmax(-1)
            kls.append((own.exp() * (own - q[both].log_softmax(-1))).sum() if both.any() else torch.tensor(torch.nan))
        return torch.stack([kl.double() for kl in kls])

    def blended(self, line: int, weights: list[float]) -> torch.Tensor:
        """c₀ log base + c₁ log policy in float64, masked where the base is or a policy that counts is."""
        base, policy = self.base()[line].double(), self.policy()[line]
        masked = (base == -torch.inf) | ((policy == -torch.inf) & (weights[1] != 0))
        first, second = (x.masked_fill(x == -torch.inf, 0.0) for x in (base, policy))
        return (weights[0] * first + weights[1] * second).masked_fill(masked, -torch.inf)


def _case(
    vocabulary: int,
    rank: int,
    width: int | None = None,
    dtype: torch.dtype = torch.float32,
    places: tuple[int, ...] = PLACES,
) -> Case:
    lines, width = len(places), width or vocabulary
    whole = torch.tensor([[0.3, 0.7]]).expand(lines, 2).contiguous()
    asked = BlendRows(
        torch.tensor(places, dtype=torch.int32), torch.full((lines,), -torch.inf), whole, whole,
        torch.randint(2**62, (lines,)),
    )  # fmt: skip
    weight = (torch.randn(width, rank) / rank**0.5).to(dtype)
    return Case(
        2 * torch.randn(max(places) + 1, vocabulary),
        torch.randn(lines, rank),
        weight,
        torch.randn(width).to(dtype),
        asked,
    )


def _triton(*inputs: object, **options: object) -> BlendedRows:
    logits, features = inputs[:2]
    assert isinstance(logits, torch.Tensor)
    assert isinstance(features, torch.Tensor)
    with poisoned_memory():
        workspace = make_workspace(len(features) + 1, logits.shape[1], logits.device)
        return head_blend(*inputs, workspace, **options)  # type: ignore[arg-type]


def _twin(*inputs: object, samples: int = 0, gated: bool = True) -> BlendedRows:
    return reference.head_blend(*inputs, samples)  # type: ignore[arg-type]


BLENDS: dict[str, Callable[..., BlendedRows]] = {"triton": _triton, "twin": _twin}


def _assert_rows(case: Case, before: Case, result: BlendedRows, expected: dict[int, torch.Tensor]) -> None:
    """`expected`: line → its row. Every other row kept its bits, and what is returned is what was there and is."""
    written = {int(case.asked.rows[line]): value for line, value in expected.items()}
    for row in range(len(case.logits)):
        if row in written:
            torch.testing.assert_close(case.logits[row].double(), written[row], rtol=1e-5, atol=2e-5)
        else:
            assert torch.equal(case.logits[row].nan_to_num(7.0), before.logits[row].nan_to_num(7.0))
    own, guided = before.base(), case.base()
    assert torch.equal(result.base.nan_to_num(7.0), own.nan_to_num(7.0))
    assert torch.equal(result.guided.nan_to_num(7.0), guided.nan_to_num(7.0))
    for total, rows in ((result.base_total, own), (result.guided_total, guided)):
        torch.testing.assert_close(total.double(), rows.double().logsumexp(-1), rtol=1e-5, atol=1e-5, equal_nan=True)
    real = case.asked.rows >= 0
    changed = own.argmax(-1) != guided.argmax(-1)
    assert result.changed[real].tolist() == changed[real].tolist()
    assert not result.changed[~real].any()


def _copy(case: Case) -> Case:
    return replace(case, logits=case.logits.clone())


@pytest.mark.parametrize("name", BLENDS)
@pytest.mark.parametrize(
    ("vocabulary", "rank", "width", "dtype"),
    [
        (300, 1, 300, torch.float32), (1027, 129, 1027, torch.float32), (2176, 160, 2000, torch.bfloat16),
        (770, 33, 800, torch.float16),
    ],
)  # fmt: skip
def test_the_exact_kl_decides_and_the_row_is_blended(
    name: str, vocabulary: int, rank: int, width: int, dtype: torch.dtype
) -> None:
    case = _case(vocabulary, rank, width, dtype)
    case.logits[3, ::3], case.bias[1::5] = -torch.inf, -torch.inf
    before, kl = _copy(case), case.kl()
    above, below = [[0.3, 0.7], [0.3, 0.7], [0.5, 0.5], [1.5, -0.5]], [[0.0, 1.0]] * 4
    threshold = (kl + torch.tensor([-0.01, 0.01, 0.0, -0.01])).float()
    case.asked = replace(case.asked, threshold=threshold, above=torch.tensor(above), below=torch.tensor(below))
    result = BLENDS[name](*case.inputs)
    torch.testing.assert_close(result.kl.double(), kl, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(result.estimate.nan_to_num(-1), result.kl.nan_to_num(-1))
    assert result.opened.tolist() == [1, 0, 0, 1]
    expected = {n: before.blended(n, w) for n, w in ((0, above[0]), (1, below[1]), (3, above[3]))}
    _assert_rows(case, before, result, expected)


@pytest.mark.parametrize("name", BLENDS)
def test_rows_without_a_gate_are_the_same_whether_a_neighbour_has_one(name: str) -> None:
    """Twenty-one lines, more than are multiplied at once where there are few."""
    places = tuple(torch.randperm(30)[:20].tolist())
    direct = _case(700, 40, places=(*places, -1))
    direct.logits[places[2], 5:] = -torch.inf
    before, waiting = _copy(direct), _copy(direct)
    result = BLENDS[name](*direct.inputs, gated=False)
    expected = {n: before.blended(n, [0.3, 0.7]) for n in range(20)}
    _assert_rows(direct, before, result, expected)
    assert result.opened.tolist() == [1] * 20 + [0]
    again = BLENDS[name](*waiting.inputs, gated=True)
    assert torch.equal(waiting.logits, direct.logits)
    for field in ("kl", "guided_total", "changed", "opened"):
        assert torch.equal(getattr(again, field).nan_to_num(7), getattr(result, field).nan_to_num(7)), field


@pytest.mark.parametrize("name", BLENDS)
@pytest.mark.parametrize("gated", [False, True])
def test_rows_that_have_no_kl_or_whose_choice_is_the_base_keep_their_bits(name: str, gated: bool) -> None:
    """A hidden state, a logit and a weight that are no numbers, all tokens masked, and nothing in common."""
    case = _case(1030, 20, places=(3, 0, 5, 1, 2, 4))
    case.features[0, 7], case.logits[0, 77], case.features[3] = torch.nan, torch.nan, torch.inf
    case.logits[5] = -torch.inf
    case.bias[500:], case.logits[2, :500] = -torch.inf, -torch.inf
    case.asked.above[5] = torch.tensor([1.0, 0.0])
    before = _copy(case)
    result = BLENDS[name](*case.inputs, gated=gated)
    assert result.opened.tolist() == [0, 0, 0, 0, 0, 1]
    assert result.kl.isnan().tolist() == [True] * 5 + [False]
    assert not result.changed.any()
    _assert_rows(case, before, result, {})


@pytest.mark.parametrize("name", BLENDS)
def test_samples_estimate_the_kl_and_decide(name: str) -> None:
    """Ten estimates of 300 draws: their mean deviates by five standard errors once in two million runs, and draws of
    the base would be off by many more."""
    case = _case(160, 12, places=tuple(range(10)))
    case.logits[:], case.features[:] = case.logits[0].clone(), 2 * case.features[0]
    case.logits[:, ::4], case.bias[1::4] = -torch.inf, -torch.inf
    before, kl = _copy(case), float(case.kl()[0])
    both = case.policy()[0] > -torch.inf
    p, q = case.policy()[0][both].log_softmax(-1), case.base()[0].double()[both].log_softmax(-1)
    variance = float((p.exp() * (p - q - kl) ** 2).sum())
    case.asked = replace(case.asked, threshold=torch.full((10,), kl), below=torch.tensor([[1.0, 0.0]] * 10))
    result = BLENDS[name](*case.inputs, samples=300)
    assert abs(float(result.estimate.double().mean()) - kl) < 5 * (variance / (300 * 10)) ** 0.5
    opened = (result.estimate > case.asked.threshold).tolist()
    assert result.opened.tolist() == opened
    _assert_rows(case, before, result, {n: before.blended(n, [0.3, 0.7]) for n in range(10) if opened[n]})


def test_rows_with_room_between_them_and_bad_arguments() -> None:
    case = _case(300, 8)
    wide = torch.randn(6, 320)
    case.logits = wide[:, :300]
    before, beside = _copy(case), wide[:, 300:].clone()
    result = _triton(*case.inputs)
    _assert_rows(case, before, result, {n: before.blended(n, [0.3, 0.7]) for n in (0, 1, 3)})
    assert torch.equal(wide[:, 300:], beside)
    with pytest.raises(ValueError, match=r"samples: 1025 is not between 0 and 1024"):
        _triton(*case.inputs, samples=1025)
    with pytest.raises(ValueError, match="samples: 5 decide nothing"):
        _triton(*case.inputs, samples=5, gated=False)
    with pytest.raises(ValueError, match="weight: the stride"):
        _triton(case.logits, case.features, case.weight.t().contiguous().t(), case.bias, case.asked)
    none = replace(case.asked, **{name: getattr(case.asked, name)[:0] for name in BlendRows.__slots__})
    assert _triton(case.logits, case.features[:0], case.weight, case.bias, none).guided.shape == (0, 300)
