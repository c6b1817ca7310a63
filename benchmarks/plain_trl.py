"""TRL's own trainers on the same data and settings as `steersman train`: what ours are held against."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import set_seed
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from steersman.benchmarks.runs import Run, logged
from steersman.training.checkpoints import save_checkpoint
from steersman.training.configuration import load, parse
from steersman.training.dpo import DPOArguments
from steersman.training.rewards.arguments import RewardArguments
from steersman.training.rewards.recipe import load_classifier
from steersman.training.world.pairs import read_rows


@dataclass(frozen=True)
class PlainRun(Run):
    """A run's model, data, settings and steps, by TRL's trainer from the rows' texts."""

    def __call__(self) -> None:
        with logged(self.log):
            (_train_reward if self.kind == "reward" else _train_policy)(self.argv)


def _train_reward(argv: Sequence[str]) -> None:
    arguments, config = parse("reward", RewardArguments, RewardConfig, argv)
    set_seed(config.seed)
    model, tokenizer = load_classifier(arguments)
    rows = _text_rows(arguments.train_file)
    RewardTrainer(model, config, train_dataset=rows, processing_class=tokenizer).train()
    save_checkpoint(model, tokenizer, config.output_dir, {"kind": "reward", "objective": "full"})


def _train_policy(argv: Sequence[str]) -> None:
    arguments, config = parse("dpo", DPOArguments, DPOConfig, argv)
    set_seed(config.seed)
    model, tokenizer = load(arguments.model, AutoModelForCausalLM)
    rows = _text_rows(arguments.train_file)
    DPOTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer).train()
    save_checkpoint(model, tokenizer, config.output_dir, {"kind": "policy", "beta": config.beta})


def _text_rows(path: str) -> Dataset:
    return Dataset.from_list(
        [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in read_rows(Path(path))]
    )
