"""The k most likely tokens with their log-probabilities: Triton's interpreter and the torch twin against float64."""

import random

import pytest
import torch

from steersman.kernels import reference
from steersman.kernels.topk import make_workspace, topk_logprobs
from tests.kernels.poison import poisoned_memory

VOCABULARIES = (300, 4099, 8192, 50257)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _run(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with poisoned_memory():
        return topk_logprobs(logits, k, make_workspace(len(logits) + 2, logits.shape[1], logits.device))


def _check(logits: torch.Tensor, k: int) -> None:
    ids, logprobs, totals = _run(logits, k)
    exact = logits.double()
    order = exact.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(ids.long(), order.indices[:, :k]), "value descending, ties by lower id"
    torch.testing.assert_close(totals.double(), exact.logsumexp(-1), rtol=0, atol=1e-5)
    expected = (order.values - exact.logsumexp(-1, keepdim=True))[:, :k]
    expected = torch.where(order.values[:, :k] == -torch.inf, -torch.inf, expected)
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_random_rows(vocabulary: int, dtype: torch.dtype) -> None:
    k = random.choice((1, 2, 5, 8, 10, 16, 17, 32))
    _check((3 * torch.randn(2, vocabulary)).to(dtype), k)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_sixty_four_candidates(vocabulary: int) -> None:
    _check(torch.randn(1, vocabulary), 64)


def test_the_candidates_of_one_group_and_of_neighbouring_groups() -> None:
    logits = torch.randn(4, 4099)
    logits[0, 160:176] += 20
    logits[1, 250:270] += 20
    logits[2, -10:] += 20
    logits[3, :3] += 20
    _check(logits, 10)


def test_ties_go_to_the_lower_id() -> None:
    logits = torch.randint(4, (3, 4099)).float()
    logits[1] = 0.0
    logits[2] = torch.where(torch.rand(4099) < 0.5, 0.0, -0.0)
    _check(logits, 17)


def test_masked_entries_and_rows() -> None:
    logits = torch.randn(5, 4099)
    logits[0, ::2] = -torch.inf
    logits[1] = -torch.inf
    logits[2] = -torch.inf
    logits[2, torch.tensor([7, 4000, 19])] = torch.tensor([-3.0, 1.0, 0.5])
    logits[3, 16:] = -torch.inf
    _check(logits, 10)


def test_the_largest_and_the_smallest_numbers_keep_their_order() -> None:
    logits = torch.randn(2, 300)
    logits[0] = -torch.rand(300) * 1e-3
    logits[0, :4] = torch.tensor([1e-38, -3e38, 1e-40, -1e-40])
    logits[1, :3] = torch.tensor([-300.0, 100.0, 99.0])
    _check(logits, 8)


def test_a_row_with_nan_says_so_and_its_neighbours_do_not() -> None:
    logits = torch.randn(3, 4099)
    logits[1, random.randrange(4099)] = torch.nan
    ids, logprobs, totals = _run(logits, 5)
    assert bool(logprobs[1].isnan().all())
    assert bool(totals[1].isnan())
    assert bool(((ids >= 0) & (ids < 4099)).all())
    _check(logits[[0, 2]], 5)


def test_rows_with_room_between_them() -> None:
    padded = torch.full((3, 320), 1e9)
    padded[:, :300] = torch.randn(3, 300)
    _check(padded[:, :300], 7)


def test_no_rows_and_bad_arguments() -> None:
    workspace = make_workspace(2, 300, torch.device("cpu"))
    assert topk_logprobs(torch.empty(0, 300), 3, workspace)[0].shape == (0, 3)
    for k in (0, 65):
        with pytest.raises(ValueError, match=r"k: .* is not between 1 and 64"):
            topk_logprobs(torch.randn(2, 300), k, workspace)
    with pytest.raises(ValueError, match="logits: the stride"):
        topk_logprobs(torch.randn(300, 2).T, 3, workspace)


def test_the_twin_gives_the_same() -> None:
    logits = torch.randn(3, 4099)
    logits[1, ::3] = -torch.inf
    for own, twin in zip(_run(logits, 12), reference.topk_logprobs(logits, 12), strict=True):
        torch.testing.assert_close(own, twin, rtol=0, atol=1e-5)
