"""The record of a request: one entry a position, whatever is scored again, dropped or decoded elsewhere."""

import random
from typing import Any

import pytest
import torch

from steersman.guidance.report import ChosenStep, Counts, Position, VocabularyStep
from steersman.guidance.rows import (
    GuidedRequest,
    LastTokens,
    Row,
    Steered,
    begin_positions,
    choose_draft_tokens,
    choose_known_tokens,
    place_draft,
)
from tests.support.oracle import plan_of

WIDTH = 16
BUDGETED = {"method": "mixed", "policy": "p", "mix": 0.5, "kl_budget": 4.0}
TRACED = {"method": "mixed", "policy": "p", "mix": 0.5, "trace": True}


def start(guidance: dict[str, Any] = BUDGETED, output: int = 0, index: int = 0) -> Row:
    return Row(index, GuidedRequest(index, plan_of(guidance), 2), [3, 4], list(range(5, 5 + output)))


def draw_step(lines: int) -> VocabularyStep:
    base, guided = torch.randn(lines, WIDTH), torch.randn(lines, WIDTH)
    changed, opened = base.argmax(-1) != guided.argmax(-1), torch.ones(lines, dtype=torch.bool)
    return VocabularyStep(base, guided, base.logsumexp(-1), guided.logsumexp(-1), changed, opened)


def begin(rows: list[Row]) -> None:
    tokens = torch.tensor([[*row.prompt, *row.output][-1] for row in rows])
    begin_positions(rows, LastTokens(rows, lambda: tokens))


def logprobs_of(position: Position) -> list[float]:
    assert isinstance(position.step, ChosenStep)
    return position.step.values[position.line, :2].tolist()


def test_a_position_that_is_scored_again_gives_back_what_it_had_spent() -> None:
    row = start(output=3)
    row.request.positions = [Position() for _ in range(5)]
    row.request.spent = [0.1, 0.2, 0.3, 0.4, 0.5]
    begin([row])
    assert row.request.spent == [0.1, 0.2, 0.3, 0.0]
    assert len(row.request.positions) == 4
    assert row.request.budget_left == pytest.approx(4.0 - 0.6)


def test_only_a_budget_is_kept_account_of() -> None:
    row = start({**BUDGETED, "kl_budget": None})
    begin([row])
    assert row.request.spent == []
    assert row.request.budget_left == float("inf")


def test_positions_computed_ahead_of_a_stop_are_dropped_with_what_they_spent() -> None:
    row = start(output=2)
    row.request.positions = [Position() for _ in range(4)]
    row.request.spent = [0.1, 0.2, 0.3, 0.4]
    choose_known_tokens(row.request, row.output)
    assert len(row.request.positions) == 2
    assert row.request.spent == [0.1, 0.2]
    choose_known_tokens(row.request, [])
    assert (row.request.positions, row.request.spent) == ([], [])


def test_each_step_over_the_vocabulary_becomes_what_its_chosen_token_made_of_it(rng: random.Random) -> None:
    rows = [start(TRACED if n == 1 else BUDGETED, index=n) for n in range(4)]
    begin(rows)
    step, other = draw_step(2), draw_step(1)
    for row, (shared, line) in zip(rows, ((step, 1), (step, 0), (other, 0)), strict=False):
        Steered(row, row.request.plan.formula).record(shared, line)
    tokens = [rng.randrange(WIDTH) for _ in rows]
    for row, token in zip(rows, tokens, strict=True):
        row.output = [token]
    begin(rows)
    for n, (shared, line) in enumerate(((step, 1), (step, 0), (other, 0))):
        expected = [float(logits[line].log_softmax(-1)[tokens[n]]) for logits in (shared.guided, shared.base)]
        assert logprobs_of(rows[n].request.positions[0]) == pytest.approx(expected, abs=1e-5)
    assert rows[3].request.positions[0].step is None, "the base decoded it"
    assert [bool(row.request.positions[0].traced) for row in rows] == [False, True, False, False]
    assert all(len(row.request.positions) == 2 for row in rows)


def test_the_last_token_of_an_answer_completes_its_last_step(rng: random.Random) -> None:
    row, token = start(), rng.randrange(WIDTH)
    begin([row])
    step = draw_step(3)
    Steered(row, row.request.plan.formula).record(step, 2)
    choose_known_tokens(row.request, [token, 9])
    expected = [float(logits[2].log_softmax(-1)[token]) for logits in (step.guided, step.base)]
    assert logprobs_of(row.request.positions[0]) == pytest.approx(expected, abs=1e-5)


def test_a_draft_replaces_what_an_earlier_one_has_left_behind_a_rejected_token(rng: random.Random) -> None:
    request = start().request
    first, second = ([Row(n, request, (), ()) for n in range(size)] for size in (4, 2))
    for row in first:
        Steered(row, request.plan.formula).record(draw_step(1), 0)
    place_draft(first, [2, 3, 4, 5])
    assert len(request.positions) == 6
    assert all(position.step is None for position in request.positions[:2])
    place_draft(second, [4, 5])
    assert [id(p) for p in request.positions[2:]] == [id(row.record) for row in (*first[:2], *second)]
    choose_known_tokens(request, [7] * 5)
    assert request.positions[-1] is second[0].record


def test_every_row_of_a_draft_becomes_what_the_token_behind_it_made_of_it(rng: random.Random) -> None:
    plan = plan_of(TRACED)
    requests = [GuidedRequest(n, plan, 1) for n in range(2)]
    rows = [Row(n, requests[n // 3], (), ()) for n in range(5)]
    step = draw_step(4)
    for line, row in enumerate((rows[3], rows[0], rows[4], rows[2])):
        Steered(row, plan.formula).record(step, line)
    tokens = [rng.randrange(WIDTH) for _ in rows]
    choose_draft_tokens(rows, torch.tensor(tokens))
    assert rows[1].record.step is None, "the base decoded it"
    for line, n in enumerate((3, 0, 4, 2)):
        expected = [float(logits[line].log_softmax(-1)[tokens[n]]) for logits in (step.guided, step.base)]
        assert logprobs_of(rows[n].record) == pytest.approx(expected, abs=1e-5)
        assert rows[n].record.traced


def test_tokens_that_were_drafted_before_a_stop_are_chosen_from_the_answer(rng: random.Random) -> None:
    request, step = start().request, draw_step(3)
    rows = [Row(n, request, (), ()) for n in range(3)]
    for line, row in enumerate(rows):
        Steered(row, request.plan.formula).record(step, line)
    place_draft(rows, [1, 2, 3])
    tokens = [rng.randrange(WIDTH) for _ in range(3)]
    choose_known_tokens(request, tokens)
    assert len(request.positions) == 3
    for line in range(2):
        expected = [float(logits[line].log_softmax(-1)[tokens[line + 1]]) for logits in (step.guided, step.base)]
        assert logprobs_of(request.positions[line + 1]) == pytest.approx(expected, abs=1e-5)


def test_positions_that_another_worker_guided_stay_empty(rng: random.Random) -> None:
    row, tokens = start(), [rng.randrange(WIDTH) for _ in range(4)]
    begin([row])
    step = draw_step(1)
    Steered(row, row.request.plan.formula).record(step, 0)
    row.output = tokens
    begin([row])
    assert len(row.request.positions) == 5
    expected = [float(logits[0].log_softmax(-1)[tokens[0]]) for logits in (step.guided, step.base)]
    assert logprobs_of(row.request.positions[0]) == pytest.approx(expected, abs=1e-5)
    assert all(position.step is None for position in row.request.positions[1:])
    late = start(output=3)
    begin([late])
    assert len(late.request.positions) == 4


def test_what_stands_below_a_gate_is_recorded_where_the_gate_is_decided_later() -> None:
    plan = plan_of({"method": "kl_threshold", "policy": "p", "threshold": 1.0, "mix": 0.3})
    for gate, below in ((plan.gate.kl, plan.below), (None, Position().below)):
        row = Row(0, GuidedRequest(0, plan, 1), [3], [])
        begin([row])
        Steered(row, plan.formula, gate).record(draw_step(1), 0)
        assert row.request.positions[-1].formula == plan.formula
        assert row.request.positions[-1].below == below


def test_a_request_begins_with_nothing_recorded_counted_or_failed() -> None:
    request = start().request
    assert (request.positions, request.spent, request.counts) == ([], [], Counts())
    assert (request.error, request.finished, request.seed) == (None, False, 0)


def last_of(row: Row, token: int) -> LastTokens:
    """What the device knows of one row."""
    return LastTokens([row], lambda: torch.tensor([token]))


def test_a_last_token_that_the_device_alone_knows_completes_its_step(rng: random.Random) -> None:
    row, tokens = start(), [rng.randrange(WIDTH) for _ in range(2)]
    steps = [draw_step(1), draw_step(1)]
    for n, step in enumerate(steps):
        row.output = [-1] * n
        begin_positions([row], last_of(row, tokens[n - 1] if n else 4))
        Steered(row, row.request.plan.formula).record(step, 0)
    row.output = [-1, -1]
    begin_positions([row], last_of(row, tokens[1]))
    for position, step, token in zip(row.request.positions, steps, tokens, strict=False):
        expected = [float(logits[0].log_softmax(-1)[token]) for logits in (step.guided, step.base)]
        assert logprobs_of(position) == pytest.approx(expected, abs=1e-5)


def test_no_more_is_spared_than_nothing() -> None:
    request = start().request
    request.saved_policy_tokens = request.saved_reward_model_tokens = 2
    request.count_policy(9, 5)
    request.count_reward_model(9, 5)
    assert request.counts == Counts(9, 9, 0, 0)


def test_tokens_read_are_counted_and_those_caught_up_are_spared_no_more() -> None:
    request = start().request
    request.saved_policy_tokens, request.saved_reward_model_tokens = 5, 2
    request.count_policy(7, 3)
    request.count_policy(1, 0)
    request.count_reward_model(4, 3)
    request.count_reward_model(6, 0)
    counts = request.counts
    assert (counts.policy_tokens, counts.saved_policy_tokens) == (8, 2)
    assert (counts.reward_model_tokens, counts.saved_reward_model_tokens) == (10, 0)


def test_a_row_tells_its_position_and_which_of_the_tokens_read_were_its_answers() -> None:
    row = start(output=4)
    assert row.position == 4
    assert list(row.prefix.tokens()) == [3, 4, 5, 6, 7, 8]
    assert [row.caught_up(read) for read in (0, 2, 3, 9)] == [0, 2, 3, 3]
    assert start().caught_up(5) == 0
    resumed = Row(0, row.request, [3, 4, 5, 6], [7])
    assert resumed.position == 3, "a prompt may hold what was generated before a preemption"


def test_the_last_tokens_are_found_by_row(rng: random.Random) -> None:
    rows = [start(index=n) for n in (4, 1, 3)]
    last = LastTokens(rows, lambda: torch.tensor([40, 10, 30]))
    assert last.of(rows).tolist() == [40, 10, 30]
    assert last.of([rows[2], rows[0]]).tolist() == [30, 40]
    assert last.of(rows[:2]).tolist() == [40, 10]
