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
    rows, readings = rows_of(*range(WIDTH + 1)), Readings(WIDTH)
    logits = torch.randn(len(rows), width)
    readings.add("p", rows, logits)
    gathered, common = readings.gather("p", rows), min(width, WIDTH)
    assert gathered.shape == (len(rows), WIDTH)
    assert torch.equal(gathered[:, :common], logits[:, :common])
    assert bool(gathered[:, common:].isneginf().all())


class Layer:
    """Maps features [.., 3] to outputs by a table, and notes for which tokens it was computed."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.table = torch.randn(3, vocabulary)
        self.wanted: list[torch.Tensor] = []

    def every(self, features: torch.Tensor) -> torch.Tensor:
        """Of all tokens."""
        return features @ self.table

    def at(self, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Of some tokens of each row."""
        self.wanted.append(tokens)
        return self.every(features).gather(1, tokens)


@pytest.mark.parametrize("width", [WIDTH - 3, WIDTH, WIDTH + 3])
@pytest.mark.parametrize("adds_base", [False, True])
def test_a_layers_outputs_are_computed_where_they_are_needed(rng: random.Random, width: int, adds_base: bool) -> None:
    layer, logits = Layer(width), torch.randn(9, WIDTH)
    rows, features = rows_of(7, 2, 4), torch.randn(3, 3)
    readings = Readings(WIDTH, logits)
    readings.add("p", rows[:2], features[:2], layer, adds_base)
    readings.add("p", rows[2:], features[2:], layer, adds_base)
    expected = torch.full((3, WIDTH), -torch.inf)
    common = min(width, WIDTH)
    expected[:, :common] = (features @ layer.table)[:, :common]
    if adds_base:
        expected += logits[[7, 2, 4]]
    for places in ([0, 1, 2], [2, 0], [1]):
        chosen, tokens = [rows[n] for n in places], torch.randint(WIDTH, (len(places), 5))
        torch.testing.assert_close(readings.gather("p", chosen), expected[places])
        torch.testing.assert_close(readings.gather_at("p", chosen, tokens), expected[places].gather(1, tokens))
    assert all(int(tokens.max()) < width for tokens in layer.wanted), "it has no output for others"


@pytest.mark.parametrize("width", [WIDTH - 3, WIDTH, WIDTH + 3])
def test_outputs_of_a_few_tokens_are_those_among_all(rng: random.Random, width: int) -> None:
    rows, readings = rows_of(3, 0, 6), Readings(WIDTH)
    readings.add("p", rows, torch.randn(3, width))
    tokens = torch.randint(WIDTH, (2, 4))
    some = [rows[2], rows[0]]
    assert torch.equal(readings.gather_at("p", some, tokens), readings.gather("p", some).gather(1, tokens))


def test_a_row_that_was_written_since_is_not_taken_for_the_bases(rng: random.Random) -> None:
    """What is added to the base's logits is gathered before any of them is overwritten."""
    rows, layer, logits = rows_of(1, 0), Layer(WIDTH), torch.randn(2, WIDTH)
    before, features = logits.clone(), torch.randn(2, 3)
    readings = Readings(WIDTH, logits)
    readings.add("p", rows, features, layer, adds_base=True)
    gathered = readings.gather("p", rows)
    logits.fill_(-torch.inf)
    torch.testing.assert_close(gathered, features @ layer.table + before[[1, 0]])
