"""Candidates that heads score, and rows written in place: Triton's interpreter and the torch twin against float64."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from steersman.kernels import launch, reference
from steersman.kernels.arguments import HeadReranked, HeadRows, HeadWeights, RewardTerms
from steersman.kernels.head_rerank import head_rerank, make_workspace, tabulate_heads
from tests.kernels.poison import poisoned_memory

Rerank = Callable[[torch.Tensor, torch.Tensor, HeadRows], HeadReranked]
HEADS = [(16, None), (129, None), (40, None), (3, None), (64, None), (16, None), (200, None), (1, None)]
"""Ranks, and tokens where they are fewer than the base's."""


def _launch(logits: torch.Tensor, features: torch.Tensor, asked: HeadRows) -> HeadReranked:
    with poisoned_memory():
        workspace = make_workspace(len(asked.rows) + 1, logits.shape[1], logits.device)
        return head_rerank(logits, features, asked, workspace)


RERANKS: dict[str, Rerank] = {"triton": _launch, "twin": reference.head_rerank}


@dataclass
class Case:
    """Random arguments for four lines over six rows of logits, one of them nobody's."""

    logits: torch.Tensor
    features: torch.Tensor
    asked: HeadRows

    def exact(self, line: int, ties: list[int] | None = None) -> "Line":
        """What is to become of a line, token by token in float64, whatever spoils it left aside. ties: candidates in
        the order in which they were found, where tied ones may come in any."""
        asked, row = self.asked, self.logits[int(self.asked.rows[line])].double().tolist()
        total = math.log(math.fsum(math.exp(value - max(row)) for value in row)) + max(row)
        limit = asked.k if asked.limits is None else int(asked.limits[line])
        best = ties or sorted(range(len(row)), key=lambda token: (-row[token], token))[: asked.k]
        kept = [token if place < limit else None for place, token in enumerate(best)]
        values = [-math.inf if token is None else row[token] for token in kept]
        rewards, first = [], 0
        for head in asked.heads:
            own = self.features[line, first : first + head.tokens.shape[1]].double()
            first += head.tokens.shape[1]
            rows = [min(token, len(head.bias) - 1) for token in best]
            rewards.append([float(head.tokens[v].double() @ own + head.bias[v].double()) for v in rows])
        known = min(len(head.bias) for head in asked.heads)
        base = [-math.inf if token >= known else value for token, value in zip(best, values, strict=True)]
        return Line(best, base, [value - total for value in values], rewards, self._score(line, base, rewards))

    def _score(self, line: int, base: list[float], rewards: list[list[float]]) -> list[float]:
        terms, scores = self.asked.terms, list(base)
        for m, own in enumerate(rewards):
            strength, scale, shift = (float(t[line, m]) for t in (terms.strength, terms.scale, terms.shift))
            for place, reward in enumerate(own):
                value = scale * reward + shift
                value = -math.log1p(math.exp(-value)) if terms.log_sigmoid[line, m] else value
                scores[place] += strength * value if strength and base[place] > -math.inf else 0.0
        moved = _log_sum_exp(base) - _log_sum_exp(scores)
        return [score + moved for score in scores]


@dataclass(frozen=True)
class Line:
    """As HeadReranked, of one line."""

    ids: list[int]
    values: list[float]
    logprobs: list[float]
    rewards: list[list[float]]
    scores: list[float]


def _log_sum_exp(values: list[float]) -> float:
    largest = max(values)
    return largest + math.log(math.fsum(math.exp(value - largest) for value in values)) if values else -math.inf


def _case(
    vocabulary: int,
    k: int,
    heads: list[tuple[int, int | None]],
    dtype: torch.dtype = torch.float32,
    limits: list[int] | None = None,
    weights: torch.dtype = torch.float32,
) -> Case:
    terms = len(heads)
    made = [_head(rank, tokens or vocabulary, weights) for rank, tokens in heads]
    strength = torch.randn(4, terms)
    strength[torch.rand(4, terms) < 0.2] = 0.0
    asked = HeadRows(
        torch.tensor([3, 0, -1, 5]), k, None if limits is None else torch.tensor(limits).unsqueeze(1), made,
        RewardTerms(
            strength, torch.rand(4, terms) + 0.5, torch.randn(4, terms),
            torch.randint(2, (4, terms), dtype=torch.int32),
        ),
        torch.tensor(tabulate_heads(made)),
    )  # fmt: skip
    features = torch.randn(4, sum(rank for rank, _ in heads))
    return Case((3 * torch.randn(6, vocabulary)).to(dtype), features, asked)


def _head(rank: int, tokens: int, dtype: torch.dtype) -> HeadWeights:
    """Only what stands behind f(h) is looked at."""
    none = torch.empty(0)
    outputs = torch.randn(tokens, rank) / rank**0.5, torch.randn(tokens)
    return HeadWeights(none, none, none, torch.empty(rank), *(tensor.to(dtype) for tensor in outputs))


def _check(
    case: Case, before: torch.Tensor, done: HeadReranked, broken: tuple[int, ...] = (), ordered: bool = True
) -> None:
    """broken: lines, beside the one that is nobody's, that keep the bits of their rows."""
    lines = {line: int(row) for line, row in enumerate(case.asked.rows) if row >= 0 and line not in broken}
    exact = Case(before, case.features, case.asked)
    assert done.broken.tolist() == [line not in lines for line in range(len(case.asked.rows))]
    expected = before.clone()
    for line, row in lines.items():
        own = exact.exact(line, None if ordered else done.ids[line].tolist())
        assert done.ids[line].tolist() == own.ids
        found = ((done.values, own.values), (done.logprobs, own.logprobs), (done.rewards, own.rewards))
        for ours, theirs in (*found, (done.scores, own.scores)):
            wanted = torch.tensor(theirs, dtype=torch.float64)
            torch.testing.assert_close(ours[line].double(), wanted, rtol=1e-5, atol=5e-5)
        expected[row] = -torch.inf
        expected[row, done.ids[line]] = done.scores[line].to(before.dtype)
    # The interpreter cuts bfloat16 off where it is to be rounded.
    ulp = 2**-7 if before.dtype is torch.bfloat16 else 0.0
    torch.testing.assert_close(case.logits, expected, rtol=ulp, atol=0, equal_nan=True)
    untouched = sorted(set(range(len(before))) - set(lines.values()))
    assert torch.equal(case.logits[untouched].nan_to_num(7.0), before[untouched].nan_to_num(7.0))
    for line in set(range(len(case.asked.rows))) - set(lines):
        assert bool(done.scores[line].isnan().all())


def _run(name: str, case: Case) -> tuple[torch.Tensor, HeadReranked]:
    before = case.logits.clone()
    return before, RERANKS[name](case.logits, case.features, case.asked)


@pytest.mark.parametrize("name", RERANKS)
@pytest.mark.parametrize(
    ("vocabulary", "k", "heads"),
    [(300, 1, [(4, None)]), (4099, 10, HEADS[:2]), (4096, 64, HEADS[1:3]), (9001, 13, HEADS)],
)
def test_rows_and_everything_that_a_report_reads(
    name: str, vocabulary: int, k: int, heads: list[tuple[int, int | None]]
) -> None:
    case = _case(vocabulary, k, heads)
    _check(case, *_run(name, case))


def test_any_number_of_candidates() -> None:
    k = random.randint(1, 64)
    limits = [random.randint(1, k) for _ in range(4)]
    print(f"k {k}, limits {limits}")
    case = _case(1000, k, HEADS[:3], limits=limits)
    _check(case, *_run("triton", case))


@pytest.mark.parametrize("name", RERANKS)
def test_tokens_that_a_head_does_not_have_are_masked(name: str) -> None:
    case = _case(1000, 12, [(16, 900), (7, 800), (5, None)], limits=[12, 3, 12, 7])
    case.logits[0, 850] = case.logits[3, 950] = 30.0
    case.logits[0, 5] = 29.0
    before, done = _run(name, case)
    assert done.values[:2, 0].tolist() == [-math.inf] * 2
    assert bool(done.logprobs[:2, 0].isfinite().all())
    _check(case, before, done)


@pytest.mark.parametrize("name", RERANKS)
def test_a_row_of_tokens_that_a_head_does_not_have_keeps_its_bits(name: str) -> None:
    case = _case(300, 5, [(16, 290)])
    case.logits[0, 290:] += 100
    before, done = _run(name, case)
    assert bool(done.values[1].isneginf().all())
    assert bool(done.logprobs[1].isfinite().all())
    _check(case, before, done, broken=(1,))


@pytest.mark.parametrize("name", RERANKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_and_weights_in_half_precision(name: str, dtype: torch.dtype) -> None:
    case = _case(1000, 10, HEADS[:2], dtype, weights=dtype)
    # Candidates differ, so that the twin's order is no other.
    for row in case.logits:
        row[torch.randperm(1000)[:12]] = torch.arange(20, 32).to(dtype)
    _check(case, *_run(name, case))


def test_ties_go_to_the_lower_id_wherever_the_row_is_split() -> None:
    case = _case(9001, 14, HEADS[:1])
    case.logits = torch.randint(4, (6, 9001)).float()
    case.logits[0] = 0.0
    case.logits[5] = torch.where(torch.rand(9001) < 0.5, 0.0, -0.0)
    case.logits[3, :8190] = 0.0
    _check(case, *_run("triton", case))


def test_the_best_tokens_lie_in_one_part_beside_it_or_at_the_end() -> None:
    case = _case(9001, 14, HEADS[:2])
    case.logits[0, 4090:4100] += 50
    case.logits[3, -9:] += 50
    case.logits[5, 8192:8206] += 50
    _check(case, *_run("triton", case))


def test_where_there_are_many_rows_each_is_split_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_PROGRAMS", 8)
    grids, run = [], launch.Launch.run
    monkeypatch.setattr(launch.Launch, "run", lambda own: grids.append(own.grid) or run(own))  # type: ignore[func-returns-value]
    case = _case(9001, 14, HEADS[:2])
    _check(case, *_run("triton", case))
    assert grids == [(4, 2), (4, 2)]


@pytest.mark.parametrize("name", RERANKS)
def test_masked_tokens_stay_masked_and_a_row_without_others_keeps_its_bits(name: str) -> None:
    case = _case(1000, 10, HEADS[:1])
    case.logits[0, 3:] = -torch.inf
    case.logits[3] = -torch.inf
    before, done = _run(name, case)
    assert done.values[1].isneginf().tolist() == [False] * 3 + [True] * 7
    assert bool(done.logprobs[0].isneginf().all())
    _check(case, before, done, broken=(0,), ordered=name == "triton")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", RERANKS)
def test_a_logit_that_is_not_finite_spoils_its_own_row_only(name: str, bad: float) -> None:
    case = _case(5000, 10, HEADS[:2], limits=[10, 4, 3, 10])
    case.logits[0, random.randrange(5000)] = bad
    before, done = _run(name, case)
    assert bool(((done.ids >= 0) & (done.ids < 5000)).all())
    _check(case, before, done, broken=(1,))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", RERANKS)
def test_features_that_are_not_finite_spoil_their_own_row_only(name: str, bad: float) -> None:
    case = _case(1000, 10, HEADS[:2])
    case.asked.terms.log_sigmoid.zero_()
    case.asked.terms.strength.fill_(0.7)
    case.features[3, random.randrange(145)] = bad
    before, done = _run(name, case)
    assert not bool(done.rewards[3].isfinite().all())
    _check(case, before, done, broken=(3,))


@pytest.mark.parametrize("name", RERANKS)
def test_a_term_without_strength_may_be_anything(name: str) -> None:
    case = _case(300, 5, HEADS[:2])
    case.asked.terms.strength[1, 1] = 0.0
    before = case.logits.clone()
    own = case.exact(1)
    case.features[1, 16:] = math.nan
    done = RERANKS[name](case.logits, case.features, case.asked)
    wanted = torch.tensor(own.scores, dtype=torch.float64)
    torch.testing.assert_close(done.scores[1].double(), wanted, rtol=1e-5, atol=5e-5)
    assert not torch.equal(case.logits[0], before[0])


def test_room_between_rows_and_between_a_heads_rows() -> None:
    case = _case(300, 5, HEADS[:2])
    wide = torch.randn(6, 320)
    case.logits = wide[:, :300]
    beside = wide[:, 300:].clone()
    heads = []
    for head in case.asked.heads:
        padded = torch.full((len(head.bias), head.tokens.shape[1] + 3), math.nan)
        padded[:, :-3] = head.tokens
        heads.append(replace(head, tokens=padded[:, :-3]))
    case.asked = replace(case.asked, heads=heads, table=torch.tensor(tabulate_heads(heads)))
    features = torch.full((4, 150), math.nan)
    features[:, :145] = case.features
    case.features = features[:, :145]
    _check(case, *_run("triton", case))
    assert torch.equal(wide[:, 300:], beside)


def test_no_rows_and_bad_arguments() -> None:
    case = _case(300, 5, HEADS[:2])
    nobody = replace(
        case.asked, rows=case.asked.rows[:0], terms=RewardTerms(*(t[:0] for t in vars(case.asked.terms).values()))
    )
    before = case.logits.clone()
    assert _launch(case.logits, case.features[:0], nobody).scores.shape == (0, 5)
    for k in (0, 65):
        with pytest.raises(ValueError, match=r"k: .* is not between 1 and 64"):
            _launch(case.logits, case.features, replace(case.asked, k=k))
    with pytest.raises(ValueError, match="no table"):
        _launch(case.logits, case.features, replace(case.asked, table=None))
    with pytest.raises(ValueError, match="logits: the stride"):
        _launch(torch.randn(300, 6).T, case.features, case.asked)
    limits = torch.ones(4, 2, dtype=torch.int64)[:, :1]
    with pytest.raises(ValueError, match="limits: strides"):
        _launch(case.logits, case.features, replace(case.asked, limits=limits))
    half = replace(case.asked.heads[0], tokens=case.asked.heads[0].tokens.bfloat16())
    with pytest.raises(ValueError, match="one precision for all"):
        tabulate_heads([case.asked.heads[1], half])
    assert torch.equal(case.logits, before)
