"""DPO over token ids: what TRL is fed, and its loss against the formula."""

import math
import random
from pathlib import Path

import pytest

from steersman.training.prefixes import truncate
from tests.support.policies import (
    EOS,
    begin,
    compute_loss,
    draw_rows,
    log_ratios,
    log_sigmoid,
    make_trainer,
    step_away,
)


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.4, 0.33, 0.25, 0.01])
def test_the_model_is_fed_each_response_s_own_first_part_and_no_other_end_token(
    folder: Path, rng: random.Random, keep: float
) -> None:
    rows = draw_rows(rng, 9)
    (batch,) = make_trainer(folder, "dpo", truncate(rows, keep)).get_train_dataloader()
    responses = [row.chosen for row in rows] + [row.rejected for row in rows]
    assert batch["input_ids"].shape[0] == len(responses) == 18
    for row, response, ids, attended, completion in zip(
        rows + rows, responses, batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    ):
        kept = begin(response, keep)
        assert ids[attended == 1].tolist() == row.prompt + kept
        assert ids[completion == 1].tolist() == kept
        assert attended.tolist() == sorted(attended.tolist(), reverse=True)
        assert (ids == EOS).sum() == (kept == response)


@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_the_loss_is_log_2_at_first_and_then_the_formula_s(folder: Path, rng: random.Random, keep: float) -> None:
    """L = −mean log σ( β log π(y_w|x)/π_ref(y_w|x) − β log π(y_l|x)/π_ref(y_l|x) ), equation 7 of DPO."""
    rows = draw_rows(rng, 7)
    trainer = make_trainer(folder, "dpo", truncate(rows, keep))
    (batch,) = trainer.get_train_dataloader()
    assert compute_loss(trainer, batch) == pytest.approx(math.log(2), abs=1e-5)
    models = step_away(trainer, folder)
    loss, terms = compute_loss(trainer, batch), []
    for row in rows:
        chosen, rejected = (sum(log_ratios(*models, row.prompt, begin(y, keep))) for y in (row.chosen, row.rejected))
        terms.append(-log_sigmoid(0.3 * (chosen - rejected)))
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    assert abs(loss - math.log(2)) > 1e-3
