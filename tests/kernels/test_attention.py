"""A step of all candidates over the paged prefix: Triton's interpreter and the torch twin against float64."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from steersman.kernels import attention, reference
from steersman.kernels.attention import candidate_attention, choose_splits
from steersman.kernels.launch import planning_for
from tests.kernels.poison import poisoned_memory

BLOCK = 16


@dataclass
class Case:
    """Four rows over one layer's cache; `lengths` tokens of each are cached, -1 for a row that only fills up."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cache_keys: torch.Tensor
    cache_values: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor
    k: int
    window: int | None

    def run(self, attend: Callable[..., torch.Tensor], **options: bool) -> torch.Tensor:
        """[B, T, HQ, d]."""
        tensors = (self.query, self.key, self.value, self.cache_keys, self.cache_values, self.tables, self.lengths)
        with poisoned_memory():
            return attend(*tensors, self.k, 0.3, self.window, **options)

    def exact(self) -> torch.Tensor:
        """One query at a time in float64: the columns that it sees, their softmax, their values."""
        rows, heads, fed, width = self.query.shape
        shared, out = heads // self.key.shape[1], torch.empty(rows, fed, heads, width, dtype=torch.float64)
        for b in range(rows):
            n = max(0, int(self.lengths[b]))
            for h in range(heads):
                keys = torch.cat((self._prefix(self.cache_keys, b, h // shared), self.key[b, h // shared]))
                values = torch.cat((self._prefix(self.cache_values, b, h // shared), self.value[b, h // shared]))
                for t in range(fed):
                    seen = self._sees(n, t)
                    scores = 0.3 * keys[seen].double() @ self.query[b, h, t].double()
                    out[b, t, h] = scores.softmax(-1) @ values[seen].double()
        return out

    def _prefix(self, cache: torch.Tensor, b: int, h: int) -> torch.Tensor:
        n = max(0, int(self.lengths[b]))
        return torch.stack([cache[h, self.tables[b, c // BLOCK], c % BLOCK] for c in range(n)] or [cache[h, 0, 0]])[:n]

    def _sees(self, n: int, t: int) -> list[int]:
        """Columns of [prefix | fed] that token t sees: prefix, last token, its candidate, itself; all in the window."""
        columns = [*range(n + 1), *([n + 1 + (t - 1) % self.k, n + t] if t else [])]
        place = [c if c <= n else n + 1 + (c - n - 1) // self.k for c in columns]
        own = n if t == 0 else n + 1 + (t - 1) // self.k
        kept = {c for c, p in zip(columns, place, strict=True) if self.window is None or p > own - self.window}
        return sorted(kept)


def _case(
    k: int,
    branches: int,
    lengths: tuple[int, ...] = (0, 37, 600, -1),
    heads: tuple[int, int] = (6, 2),
    width: int = 24,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Case:
    rows, blocks, wide = len(lengths), 40 * len(lengths) + 3, max(lengths) // BLOCK + 1
    fed = torch.randn(rows, 1 + k * branches, heads[0] + 2 * heads[1], width).to(dtype).transpose(1, 2)
    return Case(
        *fed.split([heads[0], heads[1], heads[1]], dim=1),
        torch.randn(heads[1], blocks, BLOCK, width).to(dtype),
        torch.randn(heads[1], blocks, BLOCK, width).to(dtype),
        torch.randperm(blocks)[: rows * wide].view(rows, wide),
        torch.tensor(lengths, dtype=torch.int32),
        k,
        window,
    )


def _check(case: Case, tolerance: float = 1e-5) -> None:
    """The answer, and what is in the cache afterwards: the last token's key and value, and nothing else new."""
    expected = case.exact()
    for attend, options in ((reference.candidate_attention, {}), (candidate_attention, {"exact": True})):
        keys, values = case.cache_keys.clone(), case.cache_values.clone()
        out = case.run(attend, **options)
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        for b, n in enumerate(case.lengths.tolist()):
            if n >= 0:
                place = (slice(None), int(case.tables[b, n // BLOCK]), n % BLOCK)
                keys[place], values[place] = case.key[b, :, 0], case.value[b, :, 0]
        assert torch.equal(case.cache_keys, keys)
        assert torch.equal(case.cache_values, values)


@pytest.mark.parametrize("k", [1, 10, 33])
def test_candidates_see_the_prefix_the_last_token_and_themselves(k: int) -> None:
    _check(_case(k, 1))


def test_the_tokens_behind_the_candidates_see_their_own_candidate() -> None:
    _check(_case(7, 2))


def test_a_policy_feeds_its_last_token_only() -> None:
    _check(_case(1, 0))


@pytest.mark.parametrize("window", [1, 2, 20, 64, 1000])
def test_a_window_hides_what_is_too_far_behind(window: int) -> None:
    _check(_case(4, 2, window=window))


@pytest.mark.parametrize(("heads", "width"), [((4, 4), 16), ((14, 2), 64), ((8, 1), 80)])
def test_shared_heads_and_widths_that_are_no_power_of_two(heads: tuple[int, int], width: int) -> None:
    _check(_case(5, 1, (3, 130), heads, width))


SERVED = torch.bfloat16 if torch.cuda.is_available() else torch.float16
"""Half precision in which matrices can be multiplied as they are served: Triton's interpreter cannot in bfloat16."""


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "width"), [((14, 2), 64), ((8, 2), 128)])
@pytest.mark.parametrize(("k", "branches"), [(1, 0), (10, 1), (20, 2)])
def test_products_in_half_precision_as_they_are_served(
    k: int, branches: int, heads: tuple[int, int], width: int, window: int | None
) -> None:
    """Products of half-precision numbers are summed in float32; what is left is the rounding of the softmax's weights
    and of the result, one part in 2¹¹ of float16 or 2⁸ of bfloat16 of the largest value each."""
    case = _case(k, branches, (0, 17, 300, -1), heads, width, window, SERVED)
    out = case.run(candidate_attention)
    assert out.dtype == SERVED
    bound = 2 * torch.finfo(SERVED).eps * max(float(case.value.abs().max()), float(case.cache_values.abs().max()))
    torch.testing.assert_close(out.double(), case.exact(), rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    _check(_case(10, 1, (15, 16, 200), dtype=dtype), tolerance=2e-3 if dtype == torch.float16 else 2e-2)


@pytest.mark.parametrize(("width", "dtype"), [(128, torch.float32), (64, torch.float32), (128, torch.float16)])
def test_with_the_smaller_tiles_of_gpus_before_hopper(width: int, dtype: torch.dtype) -> None:
    with planning_for(80):
        _check(_case(20, 1, (3, 70), (4, 2), width, dtype=dtype), tolerance=1e-5 if dtype == torch.float32 else 2e-3)


def test_lengths_at_the_edges_of_blocks_and_tiles() -> None:
    _check(_case(3, 1, (15, 16, 17, 63, 64, 65, 1, 128), heads=(2, 1), width=16))


def test_a_cache_of_more_numbers_than_an_int32_counts() -> None:
    case = _case(3, 1, (40, 5), heads=(3, 3), width=64, dtype=torch.float16)
    case.cache_keys, case.cache_values = _enlarge(case.cache_keys), _enlarge(case.cache_values)
    out = case.run(candidate_attention, exact=True)
    torch.testing.assert_close(out.double(), case.exact(), rtol=2e-3, atol=2e-3)
    place = (slice(None), int(case.tables[0, 40 // BLOCK]), 40 % BLOCK)
    assert torch.equal(case.cache_keys[place], case.key[0, :, 0])


def _enlarge(cache: torch.Tensor) -> torch.Tensor:
    """The same blocks in a cache whose third head begins more than 2³¹ numbers behind the first. As many lie before it,
    where a product that overflows would end up. Only pages that are touched take memory on a CPU."""
    heads, known, block, width = cache.shape
    blocks = 2**30 // (block * width) + known
    room = torch.empty(2**31 + heads * blocks * block * width, dtype=cache.dtype)
    large = room[2**31 :].view(heads, blocks, block, width)
    large[:, :known] = cache
    return large


@pytest.mark.parametrize("splits", [1, 2, 8])
def test_the_parts_of_a_split_prefix_are_merged_rightly(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight parts of a prefix of one token: most of them see nothing."""
    monkeypatch.setattr(attention, "choose_splits", lambda *_: splits)
    _check(_case(6, 1, (1, 90, 610, -1)))
    _check(_case(6, 1, (1, 90, 610, -1), window=70))


def test_the_prefix_is_split_where_there_are_few_rows_and_it_is_long() -> None:
    assert [choose_splits(rows, 8, 1024) for rows in (1, 8, 16, 32, 64)] == [4, 4, 2, 1, 1]
    assert choose_splits(1, 2, 128) == 1


def test_no_rows_and_bad_arguments() -> None:
    case = _case(2, 1)
    empty = [tensor[:0] for tensor in (case.query, case.key, case.value)]
    out = candidate_attention(*empty, case.cache_keys, case.cache_values, case.tables[:0], case.lengths[:0], 2, 0.3)
    assert out.shape == (0, 3, 6, 24)
    case.cache_keys = case.cache_keys.transpose(1, 2)
    with pytest.raises(ValueError, match="cache_keys: strides"):
        case.run(candidate_attention)
