"""The CPU's own kernels, compiled by Numba, against the torch twins; what they are not made for goes to the twins."""

import math
import random

import numpy as np
import pytest
import torch

from steersman.kernels import cpu, dispatch, reference
from steersman.kernels.arguments import HeadRows, HeadWeights, Mixed, MixRows, Reranked, RewardTerms

VOCABULARY = 120


def _terms(lines: int, terms: int) -> RewardTerms:
    strength = torch.randn(lines, terms)
    strength[torch.rand(lines, terms) < 0.2] = 0.0
    log_sigmoid = torch.randint(2, (lines, terms), dtype=torch.int32)
    return RewardTerms(strength, torch.randn(lines, terms), torch.randn(lines, terms), log_sigmoid)


def _ids(lines: int, k: int) -> torch.Tensor:
    return torch.stack([torch.randperm(VOCABULARY)[:k] for _ in range(lines)])


@pytest.mark.parametrize(("lines", "k", "terms"), [(1, 1, 1), (4, 10, 1), (7, 33, 4)])
def test_rows_and_scores_are_the_twins(lines: int, k: int, terms: int) -> None:
    logits, base = torch.randn(lines + 2, VOCABULARY), 3 * torch.randn(lines, k)
    base[torch.rand(lines, k) < 0.2] = -torch.inf
    base[:, 0] = 0.5
    rows = torch.randperm(lines + 2)[:lines]
    rows[-1] = -1 if lines > 1 else rows[-1]
    ids, asked, rewards = _ids(lines, k), _terms(lines, terms), 2 * torch.randn(lines, terms, k)
    rewards[(asked.strength == 0).unsqueeze(-1).expand_as(rewards)] = torch.nan
    ours, twins = logits.clone(), logits.clone()
    scores, broken = cpu.reward_rerank(ours, rows, ids, base, asked, rewards)
    expected = reference.reward_rerank(twins, rows, ids, base, asked, rewards)
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours, twins, rtol=0, atol=2e-5)
    assert torch.equal(broken, expected[:, 0].isnan())
    untouched = sorted(set(range(lines + 2)) - set(rows.tolist()))
    assert torch.equal(ours[untouched], logits[untouched])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_with_a_score_that_is_not_finite_stays_as_it_was(value: float) -> None:
    line = random.randrange(3)
    logits, base, rewards = torch.randn(3, VOCABULARY), torch.randn(3, 6), torch.randn(3, 1, 6)
    rewards[line, 0, random.randrange(6)] = value
    one = torch.ones(3, 1)
    written = logits.clone()
    terms = RewardTerms(one, one, torch.zeros(3, 1), torch.zeros(3, 1, dtype=torch.int32))
    scores, broken = cpu.reward_rerank(written, torch.arange(3), _ids(3, 6), base, terms, rewards)
    assert broken.tolist() == [n == line for n in range(3)]
    assert scores.isnan().all(dim=-1).tolist() == [n == line for n in range(3)]
    assert torch.equal(written[line], logits[line])
    assert not torch.equal(written[(line + 1) % 3], logits[(line + 1) % 3])


def test_a_row_without_a_candidate_stays_as_it_was() -> None:
    logits, base = torch.randn(1, VOCABULARY), torch.full((1, 4), -torch.inf)
    written, one = logits.clone(), torch.ones(1, 1)
    terms = RewardTerms(one, one, one, torch.zeros(1, 1, dtype=torch.int32))
    scores, broken = cpu.reward_rerank(written, torch.tensor([0]), _ids(1, 4), base, terms, torch.randn(1, 1, 4))
    assert bool(scores.isnan().all())
    assert broken.tolist() == [True]
    assert torch.equal(written, logits)


def test_without_strength_candidates_keep_their_bits() -> None:
    base, none = 5 * torch.randn(4, 9), torch.zeros(4, 1)
    terms = RewardTerms(none, torch.ones(4, 1), none, torch.zeros(4, 1, dtype=torch.int32))
    logits = torch.randn(4, VOCABULARY)
    scores, _ = cpu.reward_rerank(logits, torch.arange(4), _ids(4, 9), base, terms, torch.randn(4, 1, 9))
    assert torch.equal(scores, base)


@pytest.mark.parametrize(("kind", "uses_numba"), [("plain", True), ("strided", False), ("half", False)])
def test_what_is_not_contiguous_float32_goes_to_the_twin(
    kind: str, uses_numba: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    own = cpu.reward_rerank
    monkeypatch.setattr(cpu, "reward_rerank", lambda *given: called.append(1) or own(*given))  # type: ignore[func-returns-value]
    monkeypatch.setattr(dispatch, "has_kernels", lambda _: False)
    logits = {
        "plain": torch.randn(2, VOCABULARY),
        "strided": torch.randn(2, VOCABULARY + 3)[:, :VOCABULARY],
        "half": torch.randn(2, VOCABULARY).to(torch.bfloat16),
    }[kind]
    one, ids, base = torch.ones(2, 1), _ids(2, 5), torch.randn(2, 5)
    terms = RewardTerms(one, one, one, torch.zeros(2, 1, dtype=torch.int32))
    scores, _ = dispatch.write_reranked(logits, torch.arange(2), ids, base, terms, torch.randn(2, 1, 5))
    assert bool(called) is uses_numba
    torch.testing.assert_close(logits.gather(1, ids).float(), scores, rtol=1e-2, atol=1e-2)
    assert int((logits > -torch.inf).sum()) == 10


@pytest.mark.parametrize("has_bias", [True, False])
def test_outputs_of_tokens_are_the_whole_layers(has_bias: bool) -> None:
    features, weight = torch.randn(5, 77), torch.randn(VOCABULARY, 77)
    bias, tokens = torch.randn(VOCABULARY) if has_bias else None, _ids(5, 8)
    whole = features.double().numpy() @ weight.double().numpy().T
    expected = np.take_along_axis(whole if bias is None else whole + bias.double().numpy(), tokens.numpy(), axis=1)
    outputs = cpu.gather_outputs(features, weight, bias, tokens)
    np.testing.assert_allclose(outputs.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(("k", "limits"), [(1, None), (10, None), (40, [40, 1, 7])])
def test_candidates_are_the_most_likely_tokens_with_their_log_probabilities(k: int, limits: list[int] | None) -> None:
    logits = 4 * torch.randn(5, VOCABULARY)
    logits[torch.rand(5, VOCABULARY) < 0.2] = -torch.inf
    rows = torch.randperm(5)[:3]
    wanted = None if limits is None else torch.tensor(limits).unsqueeze(1)
    ids, values, logprobs = cpu.select_candidates(logits, rows, k, wanted)
    expected = reference.select_candidates(logits[rows].double(), k, wanted)
    assert torch.equal(ids, expected[0])
    assert torch.equal(values.double(), expected[1])
    torch.testing.assert_close(logprobs.double(), expected[2], rtol=0, atol=1e-5)


def test_tied_candidates_are_ordered_by_id_and_all_differ() -> None:
    logits = torch.randint(3, (4, VOCABULARY)).float()
    logits[3] = -torch.inf
    ids, values, _ = cpu.select_candidates(logits, torch.arange(4), 7)
    best = [sorted(range(VOCABULARY), key=lambda token: (-row[token], token))[:7] for row in logits.tolist()]
    assert ids.tolist() == best
    assert bool(values[3].isneginf().all())


def test_a_row_with_nan_has_no_candidates_but_nan() -> None:
    logits = torch.randn(2, VOCABULARY)
    logits[1, random.randrange(VOCABULARY)] = math.nan
    ids, values, logprobs = cpu.select_candidates(logits, torch.arange(2), 5)
    assert values.isnan().all(dim=1).tolist() == logprobs.isnan().all(dim=1).tolist() == [False, True]
    assert bool(((ids >= 0) & (ids < VOCABULARY)).all())


def test_log_probabilities_are_exact_whatever_the_spread() -> None:
    for spread in (0.01, 1.0, 30.0, 300.0):
        logits = spread * torch.randn(3, 5000)
        _, _, logprobs = cpu.select_candidates(logits, torch.arange(3), 4)
        expected = logits.double().log_softmax(dim=-1).topk(4).values
        torch.testing.assert_close(logprobs.double(), expected, rtol=3e-7, atol=3e-6)


def _head(hidden: int, width: int, rank: int) -> HeadWeights:
    shapes = ((hidden, width), (width,), (width, rank), (rank,), (VOCABULARY, rank), (VOCABULARY,))
    return HeadWeights(*(torch.randn(shape) / shape[0] ** 0.5 for shape in shapes))


def _outputs(head: HeadWeights, hidden: torch.Tensor) -> torch.Tensor:
    own = [tensor.double() for tensor in vars(head).values() if isinstance(tensor, torch.Tensor)]
    inner, inner_bias, outer, outer_bias, tokens, bias = own
    middle = hidden.double() @ inner + inner_bias
    return (middle * middle.sigmoid() @ outer + outer_bias) @ tokens.T + bias


@pytest.mark.parametrize(("lines", "sizes"), [(1, [(16, 8, 4)]), (7, [(13, 5, 3), (13, 17, 9)])])
def test_heads_are_chosen_for_computed_and_written_as_step_by_step(
    lines: int, sizes: list[tuple[int, int, int]]
) -> None:
    logits, hidden = 2 * torch.randn(lines + 2, VOCABULARY), torch.randn(lines + 2, sizes[0][0])
    rows, heads, asked = torch.randperm(lines + 2)[:lines], [_head(*size) for size in sizes], _terms(lines, len(sizes))
    written, expected = logits.clone(), logits.clone()
    head_rows = HeadRows(rows, 6, None, heads, asked)
    done, step = Reranked(4, head_rows), random.randrange(4)
    assert cpu.rerank_by_heads(written, hidden, head_rows, done, step)
    ids, values, logprobs = reference.select_candidates(logits[rows], 6)
    rewards = torch.stack([_outputs(head, hidden)[rows].gather(1, ids) for head in heads], dim=1)
    scores = reference.reward_rerank(expected, rows, ids, values, asked, rewards.float())
    found = ((done.ids, ids), (done.values, values), (done.logprobs, logprobs), (done.rewards, rewards))
    for ours, theirs in (*found, (done.scores, scores)):
        np.testing.assert_allclose(ours[step], theirs.numpy(), rtol=0, atol=3e-5)
    torch.testing.assert_close(written, expected, rtol=0, atol=3e-5)


def test_a_row_whose_hidden_state_is_not_finite_stays_as_it_was() -> None:
    logits, hidden = torch.randn(3, VOCABULARY), torch.randn(3, 16)
    hidden[1, random.randrange(16)] = math.nan
    written, one = logits.clone(), torch.ones(3, 1)
    terms = RewardTerms(one, one, one, torch.zeros(3, 1, dtype=torch.int32))
    asked = HeadRows(torch.arange(3), 4, torch.tensor([[4], [4], [2]]), [_head(16, 8, 4)], terms)
    done = Reranked(1, asked)
    assert not cpu.rerank_by_heads(written, hidden, asked, done, 0)
    assert np.isnan(done.scores[0]).all(axis=1).tolist() == [False, True, False]
    assert torch.equal(written[1], logits[1])
    assert (written > -torch.inf).sum(dim=1).tolist() == [4, VOCABULARY, 2]


@pytest.mark.parametrize("is_change", [False, True])
def test_a_policy_is_mixed_in_as_the_twin_does_it(is_change: bool) -> None:
    logits, outputs = 3 * torch.randn(6, VOCABULARY), torch.randn(4, VOCABULARY)
    logits[torch.rand(6, VOCABULARY) < 0.2] = -torch.inf
    outputs[torch.rand(4, VOCABULARY) < 0.2] = -torch.inf
    rows, coefficients = torch.randperm(6)[:4], torch.tensor([[0.4, 0.6], [-0.5, 1.5], [1.0, 0.0], [0.0, 1.0]])
    written, base = logits.clone(), logits[rows]
    done = cpu.blend(written, rows, outputs, coefficients, is_change=is_change)
    policy = base.double() + outputs.double() if is_change else outputs.double()
    expected = reference.blend_logits(base.double(), [policy], coefficients.double())
    assert bool(done.kept.all())
    assert torch.equal(done.base, base)
    for ours in (done.guided, written[rows]):
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-5)
    for total, whole in ((done.base_total, base.double()), (done.guided_total, expected)):
        torch.testing.assert_close(total.double(), whole.logsumexp(dim=-1), rtol=0, atol=2e-5)
    assert torch.equal(done.changed, base.argmax(dim=-1) != expected.argmax(dim=-1))
    untouched = sorted(set(range(6)) - set(rows.tolist()))
    assert torch.equal(written[untouched], logits[untouched])


@pytest.mark.parametrize(("lines", "sizes"), [(1, (16, 8, 4)), (2, (13, 6, 5)), (9, (31, 33, 7))])
def test_a_policy_head_is_mixed_in_and_its_tokens_are_looked_up(lines: int, sizes: tuple[int, int, int]) -> None:
    logits, hidden, head = 3 * torch.randn(lines + 2, VOCABULARY), torch.randn(lines + 2, sizes[0]), _head(*sizes)
    logits[torch.rand(lines + 2, VOCABULARY) < 0.1] = -torch.inf
    rows, coefficients = torch.randperm(lines + 2)[:lines], torch.randn(lines, 2)
    written, mixed = logits.clone(), Mixed.empty(lines, VOCABULARY)
    assert cpu.blend_by_head(written, hidden, MixRows(rows, coefficients, head), mixed)
    base = logits[rows].double()
    policy = base + _outputs(head, hidden)[rows]
    expected = reference.blend_logits(base, [policy], coefficients.double())
    torch.testing.assert_close(written[rows].double(), expected, rtol=1e-5, atol=3e-5)
    untouched = sorted(set(range(lines + 2)) - set(rows.tolist()))
    assert torch.equal(written[untouched], logits[untouched])

    tokens, values = expected.softmax(-1).multinomial(1)[:, 0], np.empty((lines, 4), dtype=np.float32)
    cpu.choose_mixed(mixed, tokens, values)
    changed = base.argmax(-1) != expected.argmax(-1)
    for column, distribution in enumerate((expected, base)):
        whole = distribution.log_softmax(-1).gather(1, tokens.unsqueeze(-1))[:, 0]
        np.testing.assert_allclose(values[:, column], whole.numpy(), rtol=1e-5, atol=5e-5)
    assert values[:, 2:].tolist() == [[float(change), 1.0] for change in changed]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_policy_head_whose_features_are_not_finite_writes_nothing(value: float) -> None:
    logits, hidden = torch.randn(3, VOCABULARY), torch.randn(3, 16)
    hidden[random.randrange(3), random.randrange(16)] = value
    written = logits.clone()
    asked = MixRows(torch.arange(3), torch.full((3, 2), 0.5), _head(16, 8, 4))
    assert not cpu.blend_by_head(written, hidden, asked, Mixed.empty(3, VOCABULARY))
    assert torch.equal(written, logits)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_a_policy_leaves_without_a_distribution_stays_the_bases(value: float) -> None:
    logits, outputs = torch.randn(3, VOCABULARY), torch.randn(3, VOCABULARY)
    if value == -math.inf:
        outputs[1] = value
    else:
        outputs[1, random.randrange(VOCABULARY)] = value
    written = logits.clone()
    done = cpu.blend(written, torch.arange(3), outputs, torch.full((3, 2), 0.5), is_change=False)
    assert done.kept.tolist() == [True, False, True]
    assert torch.equal(written[1], logits[1])
    assert torch.equal(done.guided[1], logits[1])
    assert float(done.guided_total[1]) == float(done.base_total[1])
    assert not bool(done.changed[1])


def test_a_tie_with_the_bases_most_likely_token_is_no_change() -> None:
    logits, outputs = torch.zeros(2, VOCABULARY), torch.zeros(2, VOCABULARY)
    logits[:, [3, 70]] = 5.0
    outputs[0, 3], outputs[1, 80] = -1.0, 9.0
    done = cpu.blend(logits, torch.arange(2), outputs, torch.full((2, 2), 1.0), is_change=False)
    assert done.changed.tolist() == [False, True]
