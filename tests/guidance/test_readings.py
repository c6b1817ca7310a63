"""Outputs of a step by model and row, whatever the order in which they came."""

import random

import pytest
import torch

from steersman.guidance.readings import Readings
from steersman.guidance.rows import GuidedRequest, Row
from tests.support.oracle import plan_of

WIDTH = 12


def rows_of(*indices: int) -> list[Row]:
    plan = plan_of({"method": "mixed", "policy": "p", "mix": 1.0})
    return [Row(n, GuidedRequest(n, plan, 1), [5], []) for n in indices]


def test_rows_are_gathered_in_any_order_from_what_came_in_parts(rng: random.Random) -> None:
    rows = rows_of(4, 1, 3, 7)
    logits, other = torch.randn(4, WIDTH), torch.randn(1, WIDTH)
    readings = Readings(WIDTH)
    readings.add("p", rows[:1], logits[:1])
    readings.add("p", rows[1:], logits[1:])
    readings.add("q", rows[3:], other)
    for places in ([0, 1, 2, 3], [2, 0], [3], [0, 1], [3, 2, 1, 0]):
        assert torch.equal(readings.gather("p", [rows[n] for n in places]), logits[places])
    assert torch.equal(readings.gather("q", rows[3:]), other)


def test_what_was_read_is_known_by_model_and_row() -> None:
    rows, readings = rows_of(2, 5), Readings(WIDTH)
    readings.add("p", rows[:1], torch.randn(1, WIDTH))
    assert [readings.has(name, row) for name in "pq" for row in rows] == [True, False, False, False]


@pytest.mark.parametrize("width", [WIDTH - 3, WIDTH, WIDTH + 3])
def test_outputs_of_another_width_are_brought_to_the_bases(width: int) -> None:
    rows, readings, logits = rows_of(0), Readings(WIDTH), torch.randn(1, width)
    readings.add("p", rows, logits)
    gathered, common = readings.gather("p", rows), min(width, WIDTH)
    assert gathered.shape == (1, WIDTH)
    assert torch.equal(gathered[:, :common], logits[:, :common])
    assert bool(gathered[:, common:].isneginf().all())
