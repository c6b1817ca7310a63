"""KTO over token ids: its rows, and TRL's loss on them against the paper's formula."""

import math
import random
from pathlib import Path

import pytest

from steersman.training.policies.unpaired import unpaired
from steersman.training.prefixes import truncate
from tests.support.policies import compute_loss, draw_rows, log_ratios, log_sigmoid, make_trainer, step_away


def test_every_response_is_a_row_and_its_kl_completion_another_prompt_s_of_its_batch(rng: random.Random) -> None:
    count, batch = rng.randint(5, 30), 2 * rng.randint(2, 5)
    rows = draw_rows(rng, count)
    examples = list(unpaired(rows, batch))
    labelled = [(e["prompt_ids"], e["completion_ids"], e["label"]) for e in examples]
    wanted = [(r.prompt, r.chosen, True) for r in rows] + [(r.prompt, r.rejected, False) for r in rows]
    assert sorted(labelled) == sorted(wanted)
    for start in range(0, len(examples), batch):
        own = examples[start : start + batch]
        assert sum(example["label"] for example in own) == len(own) / 2
        assert sorted(e["KL_completion_ids"] for e in own) == sorted(e["completion_ids"] for e in own)
        if len(own) > 2:
            assert all(
                (example["prompt_ids"], example["KL_completion_ids"], label) not in wanted
                for example in own
                for label in (True, False)
            )


@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_the_loss_is_the_paper_s(folder: Path, rng: random.Random, keep: float) -> None:
    """Equation 8 of KTO: z = max(0, mean over mismatched pairs of log π/π_ref); 1 − σ(β(r − z)) of what is desirable,
    1 − σ(β(z − r)) of what is not."""
    rows = truncate(draw_rows(rng, 6), keep)
    trainer = make_trainer(folder, "kto", rows)
    (batch,) = trainer.get_train_dataloader()
    responses = [row.chosen for row in rows] + [row.rejected for row in rows]
    fed = [ids[mask == 1].tolist() for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
    assert fed == responses
    models = step_away(trainer, folder)

    def ratio(prompt: list[int], response: list[int]) -> float:
        return sum(log_ratios(*models, prompt, response))

    examples = list(unpaired(rows, 12))
    z = max(0.0, sum(ratio(e["prompt_ids"], e["KL_completion_ids"]) for e in examples) / len(examples))
    rewards = [(ratio(e["prompt_ids"], e["completion_ids"]), 1 if e["label"] else -1) for e in examples]
    expected = sum(1 - math.exp(log_sigmoid(0.3 * sign * (r - z))) for r, sign in rewards) / len(rewards)
    assert compute_loss(trainer, batch) == pytest.approx(expected, rel=1e-4)
