"""Reward-guided rows written in place: Triton's interpreter and the torch twin against float64."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from steersman.kernels import reference
from steersman.kernels.arguments import RewardTerms
from steersman.kernels.launch import planning_for
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
    hidden: torch.Tensor
    heads: torch.Tensor
    bias: torch.Tensor

    def exact_rewards(self) -> torch.Tensor:
        """[4, M, k] float64."""
        terms = len(self.heads)
        return torch.stack(
            [
                torch.stack([line.double() @ self.heads[m].double() + self.bias[m].double() for m in range(terms)])
                for line in self.hidden
            ]
        )

    def exact_scores(self) -> torch.Tensor:
        """[4, k] float64: log π₀ + Σ strength · T(r), term by term."""
        scores, rewards = self.logprobs.double(), self.exact_rewards()
        for m in range(rewards.shape[1]):
            value = self.terms.scale[:, m, None].double() * rewards[:, m] + self.terms.shift[:, m, None].double()
            squashed = -torch.log1p(torch.exp(-value))
            value = torch.where(self.terms.log_sigmoid[:, m, None] == 1, squashed, value)
            scores = scores + self.terms.strength[:, m, None].double() * value
        return scores


def _case(vocabulary: int, k: int, terms: int, width: int, dtype: torch.dtype = torch.float32) -> Case:
    return Case(
        torch.randn(6, vocabulary),
        torch.tensor([3, 0, -1, 5], dtype=torch.int32),
        torch.stack([torch.randperm(vocabulary)[:k] for _ in range(4)]).int(),
        torch.randn(4, k).log_softmax(-1),
        RewardTerms(
            torch.randn(4, terms), torch.rand(4, terms) + 0.5, torch.randn(4, terms),
            torch.randint(2, (4, terms), dtype=torch.int32),
        ),
        torch.randn(4, k, width).to(dtype),
        (torch.randn(terms, width) / width**0.5).to(dtype),
        torch.randn(terms),
    )  # fmt: skip


def _run(rerank: Callable[..., torch.Tensor], case: Case, from_hidden: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rewards = case.exact_rewards().float().contiguous()
    arguments = (case.logits, case.rows, case.ids, case.logprobs, case.terms)
    with poisoned_memory():
        if from_hidden:
            rewards.fill_(torch.nan)
            return rerank(*arguments, rewards, case.hidden, case.heads, case.bias), rewards
        return rerank(*arguments, rewards), rewards


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
@pytest.mark.parametrize("from_hidden", [False, True], ids=["rewards", "hidden states"])
@pytest.mark.parametrize(
    ("vocabulary", "k", "terms", "width"), [(300, 1, 1, 64), (4099, 10, 2, 160), (8192, 64, 1, 96), (50257, 17, 3, 40)]
)
def test_scores_rewards_and_rows(name: str, from_hidden: bool, vocabulary: int, k: int, terms: int, width: int) -> None:
    case = _case(vocabulary, k, terms, width)
    before = case.logits.clone()
    scores, rewards = _run(RERANKS[name], case, from_hidden)
    torch.testing.assert_close(rewards.double(), case.exact_rewards(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.double(), case.exact_scores(), rtol=1e-5, atol=2e-5)
    _assert_rows(case, before, scores, {3: 0, 0: 1, 5: 3})


def test_with_the_smaller_steps_of_gpus_before_hopper() -> None:
    case = _case(300, 10, 3, 160)
    with planning_for(80):
        scores, rewards = _run(reward_rerank, case, True)
    torch.testing.assert_close(rewards.double(), case.exact_rewards(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.double(), case.exact_scores(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", RERANKS)
def test_hidden_states_of_half_precision_are_summed_in_float32(name: str, dtype: torch.dtype) -> None:
    case = _case(300, 10, 1, 896, dtype)
    _, rewards = _run(RERANKS[name], case, True)
    torch.testing.assert_close(rewards.double(), case.exact_rewards(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RERANKS)
def test_masked_candidates_stay_masked_whatever_their_reward(name: str) -> None:
    case = _case(4099, 10, 1, 64)
    case.logprobs[1, 4:] = -torch.inf
    case.hidden[1, 7] = torch.nan
    before = case.logits.clone()
    scores, _ = _run(RERANKS[name], case, True)
    assert bool((scores[1, 4:] == -torch.inf).all())
    torch.testing.assert_close(scores[1, :4].double(), case.exact_scores()[1, :4], rtol=1e-5, atol=2e-5)
    _assert_rows(case, before, scores, {3: 0, 0: 1, 5: 3})


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", RERANKS)
def test_a_reward_that_is_not_finite_spoils_its_own_row_only(name: str, bad: float) -> None:
    case = _case(4099, 10, 2, 64)
    case.terms.log_sigmoid.zero_()
    case.hidden[0, 3, 5] = bad
    before = case.logits.clone()
    scores, _ = _run(RERANKS[name], case, True)
    assert bool(scores[0].isnan().all())
    assert bool(scores[1:].isfinite().all())
    _assert_rows(case, before, scores, {0: 1, 5: 3})


@pytest.mark.parametrize("name", RERANKS)
def test_a_term_that_a_row_does_not_have_may_hold_anything(name: str) -> None:
    case = _case(300, 5, 2, 64)
    case.terms.strength[1, 1] = 0.0
    rewards = case.exact_rewards().float().contiguous()
    rewards[1, 1] = torch.nan
    expected = case.exact_scores()
    scores = RERANKS[name](case.logits, case.rows, case.ids, case.logprobs, case.terms, rewards)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=2e-5)


def test_rows_with_room_between_them_and_none_at_all() -> None:
    case = _case(300, 5, 1, 64)
    wide = torch.randn(6, 320)
    case.logits = wide[:, :300]
    before, beside = case.logits.clone(), wide[:, 300:].clone()
    scores, _ = _run(reward_rerank, case, False)
    _assert_rows(case, before, scores, {3: 0, 0: 1, 5: 3})
    assert torch.equal(wide[:, 300:], beside)
    nobody = RewardTerms(*(torch.zeros(0, 1) for _ in range(4)))
    none = torch.zeros(0, 5)
    assert reward_rerank(wide, none[:, 0].int(), none.int(), none, nobody, torch.zeros(0, 1, 5)).shape == (0, 5)


def test_arguments_in_another_order_are_refused() -> None:
    case = _case(300, 5, 2, 64)
    rewards = torch.randn(4, 5, 2).transpose(1, 2)
    with pytest.raises(ValueError, match="rewards: strides"):
        reward_rerank(case.logits, case.rows, case.ids, case.logprobs, case.terms, rewards)
