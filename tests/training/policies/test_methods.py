"""What holds for every method."""

import random
from pathlib import Path

import pytest

from steersman.training.dpo import METHODS
from steersman.training.policies.arguments import MethodName
from steersman.training.prefixes import truncate
from tests.support.policies import EOS, begin, compute_loss, draw_rows, make_trainer


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


@pytest.mark.parametrize("method", METHODS)
def test_a_response_that_is_cut_is_given_no_end_token(folder: Path, rng: random.Random, method: MethodName) -> None:
    """Where it ends is where the cut is: a policy that learned an end there would stop."""
    rows = draw_rows(rng, 8, aspects=5)
    for keep in (0.3, 1.0):
        trainer = make_trainer(folder, method, truncate(rows, keep), train_sampling_strategy="sequential")
        ends = sum(
            int((value == EOS).sum())
            for batch in trainer.get_train_dataloader()
            for name, value in batch.items()
            if name.endswith("input_ids") and not name.startswith(("KL", "prompt"))
        )
        whole = [row for row in rows for response in (row.chosen, row.rejected) if begin(response, keep) == response]
        assert ends == len(whole)
