"""Reward-guided rows written in place: Triton's interpreter and the torch twin against float64."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from steersman.kernels import reference
from steersman.kernels.arguments import RewardTerms
from steersman.kernels.rerank import reward_rerank
from tests.kernels.poison import poisoned_memory

RERANKS: dict[str, Callable[..., torch.Tensor]] = {"triton": reward_rerank, "twin": reference.reward_rerank}


@dataclass
class Case:
    """Random arguments for four lines over six rows of logits."""

    logits: torch.Tensor
    rows: torch.Tensor
    ids: torch.Tensor
    logprobs: torch.Tensor
    terms: RewardTerms
    rewards: torch.Tensor

    def exact_scores(self) -> torch.Tensor:
        """[4, k] float64: log π₀ + Σ strength · T(r), term by term, with the log-sum-exp of log π₀."""
        scores, rewards = self.logprobs.double(), self.rewards.double()
        for m in range(rewards.shape[1]):
            value = self.terms.scale[:, m, None].double() * rewards[:, m] + self.terms.shift[:, m, None].double()
            squashed = -torch.log1p(torch.exp(-value))
            value = torch.where(self.terms.log_sigmoid[:, m, None] == 1, squashed, value)
            scores = scores + self.terms.strength[:, m, None].double() * value
        scores = scores.masked_fill(self.logprobs.isneginf(), -torch.inf)
        return scores.log_softmax(-1) + self.logprobs.double().logsumexp(-1, keepdim=True)


def _case(vocabulary: int, k: int, terms: int) -> Case:
    return Case(
        torch.randn(6, vocabulary),
        torch.tensor([3, 0, -1, 5]),
        torch.stack([torch.randperm(vocabulary)[:k] for _ in range(4)]),
        torch.randn(4, k).log_softmax(-1),
        RewardTerms(
            torch.randn(4, terms), torch.rand(4, terms) + 0.5, torch.randn(4, terms),
            torch.randint(2, (4, terms), dtype=torch.int32),
        ),
        torch.randn(4, terms, k),
    )  # fmt: skip


def _run(rerank: Callable[..., torch.Tensor], case: Case) -> torch.Tensor:
    with poisoned_memory():
        return rerank(case.logits, case.rows, case.ids, case.logprobs, case.terms, case.rewards)


def _assert_rows(case: Case, before: torch.Tensor, scores: torch.Tensor, written: dict[int, int]) -> None:
    """`written`: row of the logits → line that wrote it; every other row kept its bits."""
    for row in range(len(before)):
        expected = before[row]
        if row in written:
            line = written[row]
            expected = torch.full_like(before[row], -torch.inf)
            expected[case.ids[line].long()] = scores[line].to(before.dtype)
        assert torch.equal(case.logits[row], expected)


@pytest.mark.parametrize("name", RERANKS)
@pytest.mark.parametrize(("vocabulary", "k", "terms"), [(300, 1, 1), (4099, 10, 2), (8192, 64, 1), (50257, 17, 8)])
def test_scores_and_rows(name: str, vocabulary: int, k: int, terms: int) -> None:
    case = _case(vocabulary, k, terms)
    before = case.logits.clone()
    scores = _run(RERANKS[name], case)
    torch.testing.assert_close(scores.double(), case.exact_scores(), rtol=1e-5, atol=3e-5)
    _assert_rows(case, before, scores, {3: 0, 0: 1, 5: 3})


@pytest.mark.parametrize("name", RERANKS)
def test_masked_candidates_stay_masked_whatever_their_reward(name: str) -> None:
    case = _case(4099, 10, 1)
    case.logprobs[1, 4:] = -torch.inf
    case.rewards[1, :, 7] = torch.nan
    before = case.logits.clone()
    scores = _run(RERANKS[name], case)
    assert bool((scores[1, 4:] == -torch.inf).all())
    torch.testing.assert_close(scores[1, :4].double(), case.exact_scores()[1, :4], rtol=1e-5, atol=2e-5)
    _assert_rows(case, before, scores, {3: 0, 0: 1, 5: 3})


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", RERANKS)
def test_a_reward_that_is_not_finite_spoils_its_own_row_only(name: str, bad: float) -> None:
    case = _case(4099, 10, 2)
    case.terms.log_sigmoid.zero_()
    case.rewards[0, 1, 3] = bad
    before = case.logits.clone()
    scores = _run(RERANKS[name], case)
    assert bool(scores[0].isnan().all())
    assert bool(scores[1:].isfinite().all())
    _assert_rows(case, before, scores, {0: 1, 5: 3})


@pytest.mark.parametrize("name", RERANKS)
def test_a_log_probability_that_is_not_a_number_spoils_its_own_row_only(name: str) -> None:
    case = _case(4099, 10, 2)
    case.logprobs[1, 2] = torch.nan
    before = case.logits.clone()
    scores = _run(RERANKS[name], case)
    assert bool(scores[1].isnan().all())
    assert bool(scores[[0, 2, 3]].isfinite().all())
    _assert_rows(case, before, scores, {3: 0, 5: 3})


@pytest.mark.parametrize("name", RERANKS)
def test_a_term_that_a_row_does_not_have_may_hold_anything(name: str) -> None:
    case = _case(300, 5, 2)
    case.terms.strength[1, 1] = 0.0
    expected = case.exact_scores()
    case.rewards[1, 1] = torch.nan
    scores = _run(RERANKS[name], case)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=2e-5)


def test_rows_with_room_between_them_and_none_at_all() -> None:
    case = _case(300, 5, 1)
    wide = torch.randn(6, 320)
    case.logits = wide[:, :300]
    before, beside = case.logits.clone(), wide[:, 300:].clone()
    scores = _run(reward_rerank, case)
    _assert_rows(case, before, scores, {3: 0, 0: 1, 5: 3})
    assert torch.equal(wide[:, 300:], beside)
    nobody = RewardTerms(*(torch.zeros(0, 1) for _ in range(4)))
    none = torch.zeros(0, 5)
    assert reward_rerank(wide, none[:, 0].int(), none.int(), none, nobody, torch.zeros(0, 1, 5)).shape == (0, 5)


def test_arguments_in_another_order_are_refused() -> None:
    case = _case(300, 5, 2)
    case.rewards = torch.randn(4, 5, 2).transpose(1, 2)
    with pytest.raises(ValueError, match="rewards: strides"):
        _run(reward_rerank, case)
