"""The comparison of methods from made-up policies whose truth is known, and what is read from real ones."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from steersman.benchmarks.policy_measures import ASPECTS, MeasurePolicy, read_responses
from steersman.benchmarks.two_dimensional import Benchmark
from steersman.benchmarks.two_dimensional_tables import METHODS, ORDER, RATES, Measured, find
from steersman.training.dpo import METHODS as TRAINED
from steersman.training.world.build import CONFIGS
from tests.support.policies import distributions, draw_rows, log_ratios
from tests.support.training import write_task


def made_up(rng: random.Random, golds: dict[str, float], noise: float = 0.01) -> Measured:
    def report(name: str) -> dict[str, Any]:
        parts = {aspect: rng.uniform(-1, 1) for aspect in ASPECTS}
        point = {"accuracy": rng.random(), "sequential_kl_chosen": 1.0, "sequential_kl_rejected": 2.0}
        own = {"gold": {**parts, "total": golds[name] + rng.gauss(0, noise)}, "kl": 5.0, "tokens": 60.0}
        return {**own, "training": [{"step": step, **point} for step in range(1, 5)]}

    tuning = {name: {rate: rng.random() for rate in RATES} for name in METHODS}
    rates = {name: max(own, key=lambda rate: own[rate]) for name, own in tuning.items()}
    reports = {name: [report(name) for _ in range(3)] for name in METHODS}
    return Measured(tuning, rates, reports, [report("DPO") for _ in range(3)], 100, 10)


@pytest.mark.parametrize(
    ("golds", "words"),
    [
        ((3.0, 2.0, 1.0), "holds here"),
        ((1.0, 2.0, 3.0), "does not hold here: by mean gold it is DPO > 1D-DPO > 2D-DPO"),
    ],
)
def test_the_verdict_on_the_paper_s_ordering_is_computed(
    rng: random.Random, golds: tuple[float, ...], words: str
) -> None:
    finding = find(made_up(rng, dict.fromkeys(METHODS, 0.0) | dict(zip(ORDER, golds, strict=True))))
    assert words in finding.sentences[0]
    word = "better" if golds[0] > golds[1] else "worse"
    assert finding.sentences[1].startswith(f"2D-DPO is {word} than 1D-DPO (gold ")


def test_an_ordering_within_the_noise_is_not_established(rng: random.Random) -> None:
    measured = made_up(rng, dict.fromkeys(METHODS, 1.0), noise=0.0)
    assert "is not established here" in find(measured).sentences[0]


def test_tables_are_those_of_the_numbers(rng: random.Random) -> None:
    golds = {name: rng.uniform(-1, 3) for name in METHODS}
    measured = made_up(rng, golds)
    found, pairs, tuning = find(measured).tables
    shown = [float(cell.split(" ")[0]) for cell in found["gold reward"][1:]]
    assert shown == pytest.approx(list(golds.values()), abs=0.05)
    for aspect in ASPECTS:
        means = [sum(report["gold"][aspect] for report in measured.reports[name]) / 3 for name in METHODS]
        assert [float(cell.split(" ")[0]) for cell in found[aspect][1:]] == pytest.approx(means, abs=0.006)
    assert set(pairs["sequential KL, rejected"]) == {"2.0 ± 0.0"}
    assert tuning["taken"] == [f"{rate:g}" for rate in measured.rates.values()]


def test_every_method_is_of_a_recipe_that_ships_and_trains_on_as_many_pairs_a_step(tmp_path: Path) -> None:
    folders, per_step = set(), set()
    for name, method in METHODS.items():
        config = yaml.safe_load((CONFIGS / method.config).read_text(encoding="utf-8")) | dict(method.flags)
        singles = config.get("method") == "kto"
        per_step.add(config["per_device_train_batch_size"] // (2 if singles else 1))
        assert config.get("method", "dpo") in TRAINED
        folders |= {Benchmark(tmp_path, 8, 2).run(name, seed, rate).folder for seed in (0, 1) for rate in RATES}
    assert len(per_step) == 1
    assert len(folders) == len(METHODS) * 2 * len(RATES)


def test_ratios_and_sequential_kl_are_those_of_each_response_alone(tmp_path: Path, rng: random.Random) -> None:
    folder = write_task(tmp_path, initializer_range=0.1)
    base, policy = (AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float64") for _ in range(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    rows = [(row.prompt, row.chosen) for row in draw_rows(rng, 7)]
    ratios, kls = read_responses(policy, base, rows)
    assert ratios.tolist() == pytest.approx([sum(log_ratios(policy, base, *row)) for row in rows], abs=1e-6)
    expected = []
    for row in rows:
        own, other = distributions(policy, *row), distributions(base, *row)
        expected.append(float((other.exp() * (other - own)).sum()))
    assert kls.tolist() == pytest.approx(expected, abs=1e-6)


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    measure = MeasurePolicy(Path("absent"), "tuning", 0, 4, 0).into(tmp_path)
    assert not measure.done
    measure.path.write_text('{"gold": {"total": 1.0}}')
    assert measure.done
    assert measure.read()["gold"]["total"] == 1.0
