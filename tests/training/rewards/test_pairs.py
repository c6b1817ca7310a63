"""Trainers of pairs: the term that centers rewards, and what is fed where responses are cut."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.trainer.reward_config import RewardConfig

from steersman.training.accuracy import score_ends
from steersman.training.data.preferences import TokenizedPreference
from steersman.training.reward import RECIPES
from steersman.training.rewards.arguments import RewardArguments
from steersman.training.rewards.causal import PrefixCollator, PrefixRewardTrainer, causal_rows
from steersman.training.rewards.losses import bradley_terry
from steersman.training.rewards.pairs import IDS, subset_rows, whole_rows
from tests.support.policies import EOS, begin, draw_rows
from tests.support.training import write_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("pairs"))


def load(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1, dtype="float32")
    return model, AutoTokenizer.from_pretrained(folder / "model")


def config_of(folder: Path, **keys: Any) -> RewardConfig:
    fixed = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    return RewardConfig(str(folder / "out"), **fixed | keys)


def centered(trainer: Any, chosen: torch.Tensor, rejected: torch.Tensor, mask: torch.Tensor | None) -> float:
    """The loss less Bradley and Terry's, over the coefficient: what is added to centre rewards."""
    return (trainer._loss(chosen, rejected, mask) - bradley_terry(chosen, rejected, mask)).item() / 0.25


def test_rewards_are_centered_by_the_prefixes_that_are_there(folder: Path, rng: random.Random) -> None:
    model, tokenizer = load(folder)
    rows = causal_rows(draw_rows(rng, 3), 4, seed=0)
    config = config_of(folder, center_rewards_coefficient=0.25)
    collator = PrefixCollator(tokenizer.pad_token_id)
    trainer = PrefixRewardTrainer(model, config, collator, rows, processing_class=tokenizer)
    scores = [[[rng.gauss(0, 3) for _ in range(4)] for _ in range(3)] for _ in range(2)]
    there = [[True] * rng.randint(1, 3) for _ in range(3)]
    mask = torch.tensor([row + [False] * (4 - len(row)) for row in there])
    chosen, rejected = torch.tensor(scores, dtype=torch.float64)
    kept = [(c + r) ** 2 for own, other, row in zip(*scores, there, strict=True)
            for c, r, _ in zip(own, other, row, strict=False)]  # fmt: skip
    assert centered(trainer, chosen, rejected, mask) == pytest.approx(sum(kept) / len(kept))
    every = [(c + r) ** 2 for own, other in zip(*scores, strict=True) for c, r in zip(own, other, strict=True)]
    assert centered(trainer, chosen, rejected, None) == pytest.approx(sum(every) / len(every))
    trainer.args.center_rewards_coefficient = None
    assert trainer._loss(chosen, rejected, mask) == bradley_terry(chosen, rejected, mask)


@pytest.mark.parametrize("objective", ["full", "truncated"])
def test_a_response_that_is_cut_is_given_no_end_token(folder: Path, rng: random.Random, objective: Any) -> None:
    rows = draw_rows(rng, 12)
    arguments = RewardArguments(str(folder / "model"), "", objective=objective, keep=0.4)
    trainer = RECIPES[objective].make_trainer(arguments, config_of(folder), *load(folder), rows)
    keep = 0.4 if objective == "truncated" else 1.0
    for row, example in zip(rows, trainer.train_dataset, strict=True):
        assert [example[name] for name in IDS] == [row.prompt + begin(y, keep) for y in (row.chosen, row.rejected)]
        for response, name in zip((row.chosen, row.rejected), IDS, strict=True):
            assert (example[name][-1] == EOS) == (begin(response, keep) == response)


def test_strength_and_label_smoothing_reach_the_loss(folder: Path, rng: random.Random) -> None:
    arguments = RewardArguments(str(folder / "model"), "", objective="full", label_smoothing=0.2)
    trainer = RECIPES["full"].make_trainer(arguments, config_of(folder), *load(folder), draw_rows(rng, 2))
    chosen, rejected, strength = torch.tensor([[rng.uniform(1, 3) for _ in range(5)] for _ in range(3)])
    expected = bradley_terry(chosen, rejected, strength=strength, label_smoothing=0.2)
    assert trainer._loss(chosen, rejected, strength=strength) == expected


def test_the_loss_is_of_the_ends_of_whole_responses_and_is_logged(folder: Path, rng: random.Random) -> None:
    rows = draw_rows(rng, 4)
    arguments = RewardArguments(str(folder / "model"), "", objective="full", label_smoothing=0.1)
    config = config_of(folder, per_device_train_batch_size=4, center_rewards_coefficient=0.25)
    model, tokenizer = load(folder)
    torch.nn.init.normal_(model.score.weight)
    trainer: Any = RECIPES["full"].make_trainer(arguments, config, model, tokenizer, rows)
    (batch,) = trainer.get_train_dataloader()
    assert int(trainer.count_terms(batch)) == 4, "pairs"
    loss, outputs = trainer.compute_loss(model.train(), dict(batch), return_outputs=True)
    ends = score_ends(model, [[*row.prompt, *y] for side in ("chosen", "rejected") for row, y in sides(rows, side)])
    chosen, rejected = ends.double().chunk(2)
    right = torch.sigmoid(chosen - rejected)
    expected = -(0.9 * right.log() + 0.1 * (1 - right).log()).mean() + 0.25 * (chosen + rejected).square().mean()
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(float(expected), rel=1e-5)
    assert outputs.logits.shape[0] == 8
    metrics = trainer._metrics["train"]
    assert metrics["margin"] == [pytest.approx(float((chosen - rejected).mean()), rel=1e-4)] * 2
    assert metrics["accuracy"] == [pytest.approx(float((chosen > rejected).double().mean()))] * 2


def sides(rows: list[TokenizedPreference], side: str) -> list[tuple[TokenizedPreference, list[int]]]:
    return [(row, getattr(row, side)) for row in rows]


def test_rows_of_whole_responses_are_grouped_by_their_longer_side(rng: random.Random) -> None:
    rows = draw_rows(rng, 6)
    lengths = [len(row.prompt) + max(len(row.chosen), len(row.rejected)) for row in rows]
    assert whole_rows(rows)["length"][:] == lengths


@pytest.mark.parametrize("ratio", [0.5, 2.0, 1000.0])
def test_a_subset_of_partial_sequences_is_drawn_by_the_seed(rng: random.Random, ratio: float) -> None:
    rows, seed = draw_rows(rng, 8), rng.randrange(2**31)
    examples = list(subset_rows(rows, ratio, seed))
    every = [
        (row.prompt + row.chosen[:n], row.prompt + row.rejected[:n])
        for row in rows
        for n in range(1, max(len(row.chosen), len(row.rejected)) + 1)
    ]
    drawn = [(example["chosen_ids"], example["rejected_ids"]) for example in examples]
    assert len(drawn) == min(len(every), ratio * len(rows)), "so many times as there are pairs"
    left = list(every)
    for pair in drawn:
        left.remove(pair)
    assert list(subset_rows(rows, ratio, seed)) == examples
    assert len(drawn) == len(every) or list(subset_rows(rows, ratio, seed + 1)) != examples


@pytest.mark.parametrize(
    ("objective", "facts"),
    [
        ("full", {"loss": "Bradley-Terry on whole responses"}),
        ("truncated", {"loss": "Bradley-Terry on the beginnings of responses", "keep": 0.4}),
    ],
)
def test_a_model_remembers_what_it_was_trained_on(objective: Any, facts: dict[str, Any]) -> None:
    assert RECIPES[objective].describe(RewardArguments("", "", objective=objective, keep=0.4)) == facts
