"""ORPO and SimPO over token ids: what TRL is fed, and its losses against the papers' formulas."""

import math
import random
from pathlib import Path

import pytest

from steersman.training.policies.arguments import MethodName
from steersman.training.prefixes import truncate
from tests.support.policies import (
    begin,
    compute_loss,
    draw_rows,
    log_sigmoid,
    make_trainer,
    step_away,
    token_logprobs,
)


@pytest.mark.parametrize("method", ["orpo", "simpo"])
@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_the_model_is_fed_each_response_s_own_first_part(
    folder: Path, rng: random.Random, method: MethodName, keep: float
) -> None:
    rows = draw_rows(rng, 7)
    (batch,) = make_trainer(folder, method, truncate(rows, keep)).get_train_dataloader()
    for side in ("chosen", "rejected"):
        ids, attended, labels = (batch[f"{side}_{name}"] for name in ("input_ids", "attention_mask", "labels"))
        for number, row in enumerate(rows):
            kept = begin(getattr(row, side), keep)
            assert ids[number][attended[number] == 1].tolist() == row.prompt + kept
            assert labels[number][labels[number] != -100].tolist() == kept


@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_simpo_s_loss(folder: Path, rng: random.Random, keep: float) -> None:
    """Equation 6 of SimPO: −log σ( β/|y_w| log π(y_w|x) − β/|y_l| log π(y_l|x) − γ )."""
    rows = truncate(draw_rows(rng, 6), keep)
    trainer = make_trainer(folder, "simpo", rows, beta=2.0, simpo_gamma=0.5)
    (batch,) = trainer.get_train_dataloader()
    policy, _ = step_away(trainer, folder)
    total = 0.0
    for row in rows:
        chosen, rejected = (mean(token_logprobs(policy, row.prompt, y)) for y in (row.chosen, row.rejected))
        total -= log_sigmoid(2.0 * (chosen - rejected) - 0.5)
    assert compute_loss(trainer, batch) == pytest.approx(total / len(rows), rel=1e-4)


@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_orpo_s_loss(folder: Path, rng: random.Random, keep: float) -> None:
    """Equation 6 of ORPO, with TRL's two choices: P(y|x) is the geometric mean of its tokens' probabilities, and the
    SFT loss reads prompts too."""
    rows = truncate(draw_rows(rng, 6), keep)
    trainer = make_trainer(folder, "orpo", rows, beta=0.3)
    (batch,) = trainer.get_train_dataloader()
    policy, _ = step_away(trainer, folder)
    ratio, sft = 0.0, []
    for row in rows:
        odds = []
        for response in (row.chosen, row.rejected):
            log_p = mean(token_logprobs(policy, row.prompt, response))
            odds.append(log_p - math.log1p(-math.exp(log_p)))
        ratio += log_sigmoid(odds[0] - odds[1]) / len(rows)
        sft += token_logprobs(policy, row.prompt[:1], row.prompt[1:] + row.chosen)
    assert compute_loss(trainer, batch) == pytest.approx(-mean(sft) - 0.3 * ratio, rel=1e-4)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
