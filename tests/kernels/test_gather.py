"""Outputs of a linear layer for a few tokens of each row: Triton's interpreter and the torch twin against float64."""

from collections.abc import Callable

import pytest
import torch

from steersman.kernels import reference
from steersman.kernels.gather import gather_outputs
from tests.kernels.poison import poisoned_memory

GATHERS: dict[str, Callable[..., torch.Tensor]] = {
    "triton": gather_outputs,
    "triton, int32": lambda features, weight, bias, tokens: gather_outputs(features, weight, bias, tokens.int()),
    "twin": reference.gather_outputs,
}


@pytest.mark.parametrize("name", GATHERS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("rows", "k", "rank"), [(1, 1, 1), (3, 10, 129), (5, 17, 64), (2, 64, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_those_of_the_whole_layer_at_the_tokens(
    name: str, has_bias: bool, rows: int, k: int, rank: int, dtype: torch.dtype
) -> None:
    vocabulary = 97
    weight = torch.randn(vocabulary, rank + 7, dtype=dtype)[:, :rank]
    bias = torch.randn(vocabulary, dtype=dtype) if has_bias else None
    features, tokens = torch.randn(rows, rank), torch.randint(vocabulary, (rows, k))
    tokens[0, 0] = vocabulary - 1
    with poisoned_memory():
        outputs = GATHERS[name](features, weight, bias, tokens)
    whole = features.double() @ weight.double().t()
    expected = (whole if bias is None else whole + bias.double()).gather(1, tokens)
    assert outputs.dtype is torch.float32
    torch.testing.assert_close(outputs.double(), expected, rtol=0, atol=1e-5 * rank**0.5 * 4)


@pytest.mark.parametrize("name", GATHERS)
def test_no_row_is_no_launch(name: str) -> None:
    outputs = GATHERS[name](torch.randn(0, 8), torch.randn(9, 8), None, torch.zeros(0, 3, dtype=torch.long))
    assert outputs.shape == (0, 3)


def test_rows_that_are_not_contiguous_are_refused() -> None:
    with pytest.raises(ValueError, match="weight"):
        gather_outputs(torch.randn(2, 8), torch.randn(8, 9).t(), None, torch.zeros(2, 3, dtype=torch.int32))
