"""What holds for every method."""

import random
from pathlib import Path

import pytest

from steersman.training.dpo import METHODS
from steersman.training.policies.arguments import MethodName
from tests.support.policies import compute_loss, draw_rows, make_trainer


@pytest.mark.parametrize("method", METHODS)
def test_padding_takes_part_in_no_loss_and_needs_no_token_of_its_own(
    folder: Path, rng: random.Random, method: MethodName
) -> None:
    rows = draw_rows(rng, 4, aspects=1)
    keys = {"weights": {"first": 1.0}} if method in ("1d", "2d") else {}
    losses = []
    for padding in (True, False):
        trainer = make_trainer(folder, method, rows, padding, **keys)
        (batch,) = trainer.get_train_dataloader()
        losses.append(compute_loss(trainer, batch))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
