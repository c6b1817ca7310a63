"""The table of heads from made-up numbers."""

import random

import pytest
import yaml

from steersman.benchmarks.heads import KINDS, SEEDS, table
from steersman.training.world.build import CONFIGS


def test_every_kind_is_of_a_recipe_that_ships() -> None:
    for kind in KINDS.values():
        assert yaml.safe_load((CONFIGS / kind.config).read_text(encoding="utf-8"))["model"] == "models/base"


def test_rows_are_means_over_seeds_and_the_best_strength_is_marked(rng: random.Random) -> None:
    golds = {
        name: {f"{strength:g}": [rng.uniform(0, 3) for _ in SEEDS] for strength in kind.strengths}
        for name, kind in KINDS.items()
    }
    best = {name: f"{rng.choice(kind.strengths):g}" for name, kind in KINDS.items()}
    found = {
        name: {
            "best": best[name],
            "seconds": [10.0, 20.0, 30.0],
            "gold": {strength: [{"sampled": g, "greedy": -g} for g in each] for strength, each in own.items()},
        }
        for name, own in golds.items()
    }
    rows = table(found)
    means = [sum(each) / len(each) for own in golds.values() for each in own.values()]
    assert [float(cell.split()[0]) for cell in rows["gold, sampled"]] == pytest.approx(means, abs=0.006)
    assert [-float(cell.split()[0]) for cell in rows["gold, greedy"]] == pytest.approx(means, abs=0.006)
    assert [cell for cell in rows["β or mix"] if "*" in cell] == [f"**{best[name]}**" for name in KINDS]
    assert set(rows["seconds"]) == {"20"}
