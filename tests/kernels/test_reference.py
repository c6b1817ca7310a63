"""The torch twins of the sampling kernels."""

import pytest
import torch

from steersman.kernels.reference import find_peaks, select_candidates, write_candidates


@pytest.mark.parametrize("vocabulary", [300, 4099, 50257])
@pytest.mark.parametrize("k", [1, 7, 64])
def test_candidates_are_the_largest_logits_in_order(vocabulary: int, k: int) -> None:
    logits = torch.randn(5, vocabulary)
    logits[1, ::2] = -torch.inf
    logits[2] = -torch.inf
    logits[2, :3] = torch.tensor([1.0, 3.0, 2.0])
    ids, values, logprobs = select_candidates(logits, k)
    order = logits.sort(dim=-1, descending=True)
    assert torch.equal(values, order.values[:, :k])
    assert torch.equal(logits.gather(1, ids), values)
    expected = logits.double().log_softmax(-1).gather(1, ids)
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-5)


def test_a_rows_own_limit_masks_the_rest() -> None:
    logits = torch.randn(3, 50)
    _, values, logprobs = select_candidates(logits, 8, torch.tensor([[1], [8], [3]]))
    assert (values > -torch.inf).sum(-1).tolist() == [1, 8, 3]
    assert torch.equal(values == -torch.inf, logprobs == -torch.inf)


def test_only_the_chosen_rows_are_written() -> None:
    logits = torch.randn(6, 40)
    before = logits.clone()
    rows, ids, scores = torch.tensor([4, 1]), torch.tensor([[3, 9], [0, 39]]), torch.randn(2, 2)
    write_candidates(logits, rows, ids, scores)
    for row in (0, 2, 3, 5):
        assert torch.equal(logits[row], before[row])
    for row, wanted, values in zip(rows, ids, scores, strict=True):
        assert torch.equal(logits[row, wanted], values)
        assert int((logits[row] > -torch.inf).sum()) == 2


def test_peaks_are_the_log_sum_exp_and_the_largest_of_each_row() -> None:
    logits = 30 * torch.randn(6, 200)
    logits[1, torch.randperm(200)[:150]] = -torch.inf
    logits[2] = -torch.inf
    logits[3, 7], logits[4, 9] = torch.nan, torch.inf
    total, best = find_peaks(logits)
    expected = logits.double().logsumexp(-1)
    torch.testing.assert_close(total[:3].double(), expected[:3], rtol=0, atol=1e-4)
    assert best[:2].tolist() == logits[:2].argmax(-1).tolist()
    assert not bool(total[2:5].isfinite().any())
    assert total[5] == pytest.approx(float(expected[5]), abs=1e-4)
