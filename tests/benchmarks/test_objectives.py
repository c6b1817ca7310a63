"""The tables of objectives from made-up models whose truth is known."""

import random

import pytest
import yaml

from steersman.benchmarks.answers import Answer, Answers
from steersman.benchmarks.objective_tables import METHODS, TRUNCATED, Measured, find
from steersman.benchmarks.sweep import BASE
from steersman.training.prefixes import SHARES
from steersman.training.world.build import CONFIGS

SEEDS, PROMPTS = 3, 5


def _answers(gold: float) -> list[Answers]:
    return [[[Answer("text", 64, True, gold, 2 * gold, 1.0, 10, 0)]] * PROMPTS for _ in range(SEEDS)]


def _shown(cells: list[str]) -> list[float]:
    return [float(cell.split(" ")[0]) for cell in cells]


def test_every_method_is_of_a_recipe_that_ships_and_differs_from_the_others() -> None:
    assert len(set(METHODS.values())) == len(METHODS)
    trained = {(m.kind, m.config, m.folder, m.flags, m.teacher, m.trl) for m in METHODS.values()}
    assert len({folder for _, _, folder, *_ in trained}) == len(trained)
    for method in METHODS.values():
        assert "train_file" in yaml.safe_load((CONFIGS / method.config).read_text(encoding="utf-8"))
        assert method.teacher is None or method.teacher in {other.folder for other in METHODS.values()}


def test_tables_and_verdicts_are_those_of_the_numbers(rng: random.Random) -> None:
    golds = {name: rng.uniform(-1, 3) for name in (BASE.name, *METHODS)}
    golds["partial, causal"] = golds["full"] + 0.5
    accuracy = {name: [{f"{s:g}": rng.random() for s in SHARES} for _ in range(SEEDS)] for name in METHODS}
    betas = {name: 2.0 if method.kind == "reward" else None for name, method in METHODS.items()}
    found = find(Measured(accuracy, betas, {name: _answers(gold) for name, gold in golds.items()}))

    (table,) = found["objectives"].tables
    assert table["trained by"] == list(golds)
    assert _shown(table["gold reward"]) == pytest.approx(list(golds.values()), abs=0.005)
    halves = [sum(seed["0.5"] for seed in accuracy[name]) / SEEDS for name in METHODS]
    assert _shown(table["accuracy at 50%"][1:]) == pytest.approx(halves, abs=0.0005)
    assert "better than those by “full” (gold +0.50" in found["objectives"].sentences[0]

    (table,) = found["truncation"].tables
    for kind, names in TRUNCATED.items():
        assert _shown(table[f"{kind}: gold reward"]) == pytest.approx([golds[name] for name in names], abs=0.005)
