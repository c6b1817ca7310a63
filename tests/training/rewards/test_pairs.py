"""Trainers of pairs: the term that centers rewards, and what is fed where responses are cut."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.trainer.reward_config import RewardConfig

from steersman.training.reward import RECIPES
from steersman.training.rewards.arguments import RewardArguments
from steersman.training.rewards.causal import PrefixCollator, PrefixRewardTrainer, causal_rows
from steersman.training.rewards.losses import bradley_terry
from steersman.training.rewards.pairs import IDS
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
