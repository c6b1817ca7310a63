"""Rows that stay the same from step to step, and that heads alone guide, are guided and reported on as if each step
were the first."""

import random
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch

from steersman.guidance import runtime as runtimes
from steersman.guidance.head_files import POLICY, REWARD
from steersman.guidance.head_models import HeadModel
from steersman.guidance.persistent_batch import STEPS, PersistentBatch
from steersman.guidance.rows import Row
from steersman.guidance.runtime import GuidanceRuntime
from tests.support.heads import random_head
from tests.support.scripted import begin_rows, scripted_runtime

WIDTH, STATE = 40, 19
SINGLE = {"method": "pargs", "reward_model": "r", "beta": 0.7, "top_k": 5}
SEVERAL = {"method": "pargs", "rewards": [{"model": "r"}, {"model": "s", "weight": -0.4}], "beta": 1.3, "top_k": 7}
MIXED = {"method": "mixed", "policy": "p", "mix": 0.6}
STEERED = {"method": "product", "policies": {"base": 0.5, "p": 0.8}}
KINDS: dict[str, list[dict[str, Any]]] = {
    "a reward": [SINGLE, {**SINGLE, "beta": 2.0, "top_k": 9}, {**SINGLE, "trace": True}],
    "two rewards": [SEVERAL, {**SEVERAL, "top_k": 3}, SEVERAL],
    "a policy": [MIXED, STEERED, {**MIXED, "mix": 0.1}],
}
OTHERS: dict[str, list[dict[str, Any]]] = {
    "a traced policy": [MIXED, {**MIXED, "trace": True}],
    "rewards beside a policy": [SINGLE, MIXED],
    "rewards over a policy": [{**SINGLE, "policies": {"base": 0.3, "p": 0.7}}] * 2,
    "a budget": [{**SINGLE, "kl_budget": 9.0}, {**MIXED, "kl_budget": 9.0}],
    "a gate": [{**SINGLE, "gate": {"first_tokens": 3}}],
}


class Twins:
    """Two runtimes with the same heads and requests. One is given the same list of rows in every step, the other a new
    one, so that nothing of a step is carried into the next."""

    def __init__(self, rng: random.Random, guidances: list[dict[str, Any]]) -> None:
        self.runtimes: list[GuidanceRuntime] = [scripted_runtime({"other": torch.zeros(WIDTH)}) for _ in range(2)]
        models: dict[str, HeadModel] = {
            name: random_head(rng, name, POLICY if name == "p" else REWARD, WIDTH, hidden_size=STATE)
            for name in ("r", "s", "p")
        }
        for runtime in self.runtimes:
            for model in models.values():
                runtime.add(model)  # type: ignore[arg-type]
        self.rows: list[list[Row]] = [begin_rows(runtime, guidances) for runtime in self.runtimes]

    def step(self, hidden: torch.Tensor | None = None, masked: bool = False, advance: bool = True) -> torch.Tensor:
        """Guides both on the same random logits, which must come out alike, and chooses a token for each row."""
        logits, count = 3 * torch.randn(len(self.rows[0]), WIDTH), len(self.rows[0])
        hidden = torch.randn(count, STATE) if hidden is None else hidden
        biased = logits.masked_fill(torch.rand(count, WIDTH) < 0.2, -torch.inf) if masked else None
        guided = [logits.clone(), logits.clone()]
        for runtime, rows, own in zip(self.runtimes, (self.rows[0], [*self.rows[1]]), guided, strict=True):
            runtime.step(own, rows, hidden=hidden, biased=biased)
        # A policy's features are summed in another order.
        torch.testing.assert_close(*guided, rtol=0, atol=1e-5, equal_nan=True)
        if advance:
            for n, token in enumerate(guided[0].softmax(-1).multinomial(1)[:, 0].tolist()):
                for rows in self.rows:
                    rows[n].output.append(token)
        return guided[0]

    def change_rows(self, change: Callable[[list[Row]], list[Row]]) -> None:
        """Gives both new rows."""
        self.rows = [change(rows) for rows in self.rows]
        for rows in self.rows:
            for index, row in enumerate(rows):
                row.index = index

    def finish(self, row: int, tokens: int | None = None) -> None:
        """Ends a request with its first `tokens`, or all; both reports are the same."""
        reports = [
            runtime.finish(rows[row].request.key, rows[row].output[:tokens])
            for runtime, rows in zip(self.runtimes, self.rows, strict=True)
        ]
        assert reports[0] is not None
        assert_alike(*map(asdict, reports))


def assert_alike(found: Any, expected: Any) -> None:
    """Equal but for the last digits of numbers, however deep they lie."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for own, other in zip(found, expected, strict=True):
            assert_alike(own, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-4, nan_ok=True)
    else:
        assert found == expected


def without(rows: list[Row], left: list[Row]) -> list[Row]:
    """The rows that have not left."""
    return [row for row in rows if not any(row is other for other in left)]


@pytest.fixture
def persisted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by an entry with each step of a persistent batch."""
    steps: list[bool] = []

    class Counted(PersistentBatch):
        def step(self, *args: Any) -> bool:
            steps.append(super().step(*args))
            return steps[-1]

    monkeypatch.setattr(runtimes, "PersistentBatch", Counted)
    return steps


@pytest.mark.parametrize("name", KINDS)
def test_many_steps_are_those_of_new_rows(rng: random.Random, persisted: list[bool], name: str) -> None:
    twins = Twins(rng, KINDS[name])
    for _ in range(2 * STEPS + 7):
        twins.step()
    assert persisted == [True] * (2 * STEPS + 6), "all but the first"
    twins.finish(0)
    twins.finish(1, tokens=rng.randint(0, STEPS))
    twins.finish(2, tokens=rng.randint(STEPS, 2 * STEPS))


@pytest.mark.parametrize("name", KINDS)
def test_rows_come_go_and_change_places(rng: random.Random, persisted: list[bool], name: str) -> None:
    twins = Twins(rng, KINDS[name] * 2)
    for _ in range(12):
        for _ in range(rng.randint(1, 4)):
            twins.step()
        event = rng.choice(["shuffle", "leave and come back", "finish"])
        order = rng.sample(range(len(twins.rows[0])), len(twins.rows[0]))
        if event == "finish" and len(order) > 2:
            twins.finish(order[0], tokens=rng.choice([None, len(twins.rows[0][order[0]].output) // 2]))
            twins.step()
            order = order[1:]
        if event == "leave and come back":
            left = [rows[order[0]] for rows in twins.rows]
            for runtime, row in zip(twins.runtimes, left, strict=True):
                runtime.pause(row.request.key)
            twins.change_rows(lambda rows, left=left: without(rows, left))  # type: ignore[misc]
            twins.step()
            twins.step()
            for rows, row in zip(twins.rows, left, strict=True):
                rows.append(row)
        twins.change_rows(lambda rows, order=order: [rows[n] for n in order])  # type: ignore[misc]
    assert any(persisted)
    for n in range(len(twins.rows[0])):
        twins.finish(n)


@pytest.mark.parametrize("name", KINDS)
def test_a_clients_masks_and_positions_that_are_scored_again(
    rng: random.Random, persisted: list[bool], name: str
) -> None:
    twins = Twins(rng, KINDS[name])
    for _ in range(30):
        twins.step(masked=rng.random() < 0.2, advance=rng.random() < 0.8)
    assert any(persisted)
    for n in range(3):
        twins.finish(n)


@pytest.mark.parametrize("name", KINDS)
def test_a_row_that_cannot_be_guided_ends_alone(rng: random.Random, persisted: list[bool], name: str) -> None:
    twins = Twins(rng, KINDS[name])
    for _ in range(3):
        twins.step()
    spoiled = rng.randrange(3)
    hidden = torch.randn(3, STATE)
    hidden[spoiled, rng.randrange(STATE)] = rng.choice([torch.nan, torch.inf])
    twins.step(hidden)
    for _ in range(3):
        twins.step()
    for rows in twins.rows:
        assert [row.request.error is not None for row in rows] == [n == spoiled for n in range(3)]
    for n in range(3):
        twins.finish(n)
    assert any(persisted)


@pytest.mark.parametrize("name", OTHERS)
def test_rows_that_something_else_decides_take_the_ordinary_way(
    rng: random.Random, persisted: list[bool], name: str
) -> None:
    twins = Twins(rng, OTHERS[name])
    for _ in range(6):
        twins.step()
    assert not persisted
    for n in range(len(twins.rows[0])):
        twins.finish(n)


def test_the_report_of_a_request_that_has_left_is_no_change_of_the_batch(rng: random.Random) -> None:
    twins = Twins(rng, KINDS["a reward"])
    twins.step()
    left = [rows[1] for rows in twins.rows]
    twins.change_rows(lambda rows: without(rows, left))
    twins.step()
    twins.step()
    before = [runtime.models.changes for runtime in twins.runtimes]
    for runtime, row in zip(twins.runtimes, left, strict=True):
        assert runtime.finish(row.request.key, row.output) is not None
    assert [runtime.models.changes for runtime in twins.runtimes] == before
