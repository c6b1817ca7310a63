"""`python -m steersman.benchmarks.training`: what a training step on all prefixes costs, beside TRL's own trainer's.

Every contestant trains a copy of one model on the same pairs in the same order, a step of each in turn, in an order
that is drawn anew for every round, so that a slow spell of the machine falls on all of them.
"""

import argparse
import copy
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from steersman.benchmarks.common.rendering import markdown, terminal
from steersman.benchmarks.common.results import RESULTS, environment, write_json
from steersman.demo import MODELS, WORLD
from steersman.training.data.preferences import TokenizedPreference, load_preferences
from steersman.training.prefixes import ALL_PREFIXES
from steersman.training.rewards.causal import PrefixCollator, PrefixRewardTrainer, causal_rows
from steersman.training.rewards.pairs import PairRewardTrainer, whole_rows
from steersman.training.weighting import weigh_terms

_WINDOW, _WARM_UP = 1024, 2
_BASELINE, _TRL, _ALL = "full", "TRL's RewardTrainer", "partial, all prefixes"


@dataclass
class Contestant:
    """A trainer, and the seconds of each of its steps."""

    trainer: RewardTrainer
    batches: Iterator[Any]
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)

    def step(self) -> int:
        """Draws a batch and trains on it; returns how many tokens it has."""
        start, used = time.perf_counter(), time.process_time()
        trainer = self.trainer
        (batch,), terms = trainer.get_batch_samples(self.batches, 1, trainer.args.device)
        tokens = int(batch["attention_mask"].sum())
        trainer.training_step(trainer.model, batch, terms)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        self.processor_seconds.append(time.process_time() - used)
        return tokens


def main(argv: Sequence[str]) -> int:
    """Measures, prints tables, and writes RESULTS/training-speed.json and .md."""
    parser = argparse.ArgumentParser(prog="python -m steersman.benchmarks.training", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="Steps of every contestant, beside two to warm up.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(list(argv))
    torch.set_num_threads(1)
    console = Console()
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    rows = load_preferences(WORLD / "test_pairs.jsonl", tokenizer, _WINDOW)
    found = []
    for name, (make, batch) in _MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            contestants = line_up(make(), tokenizer, rows, batch, folder)
            tokens = race(contestants, args.rounds, name, console)
        found.append({"model": name, "batch": batch, **_summarise(contestants, tokens)})
    write_json(args.out / "training-speed.json", {"models": found})
    text = [f"# Speed of reward-model training\n\n{_ABOUT.format(rounds=args.rounds)}"]
    for model in found:
        size = f"{model['parameters'] / 1e6:.1f} million parameters"
        title = f"{model['model']}, {size}, {model['batch']} pairs of {model['tokens_per_step']:.0f} tokens a step"
        console.print(terminal(_table(model), title))
        text.append(f"## {title}\n\n{markdown(_table(model))}")
    text.append("".join(f"- {name}: {value}\n" for name, value in environment().items() if value is not None))
    (args.out / "training-speed.md").write_text("\n".join(text), encoding="utf-8")
    return 0


def _larger() -> PreTrainedModel:
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=1024, max_position_embeddings=_WINDOW, pad_token_id=0, num_labels=1, **shape)
    return LlamaForSequenceClassification(config).float()


def _demo() -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(MODELS / "reward-partial", dtype="float32")


# How it is made, and how many pairs a step has.
_MODELS: dict[str, tuple[Callable[[], PreTrainedModel], int]] = {
    "the demo world's reward model": (_demo, 32),
    "a random Llama": (_larger, 8),
}


def line_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedPreference],
    batch: int,
    folder: str,
) -> dict[str, Contestant]:
    """The trainers by name, each at the start of its own endless draw of the same batches."""
    config = RewardConfig(
        folder, per_device_train_batch_size=batch, train_sampling_strategy="sequential", dataloader_drop_last=True,
        learning_rate=1e-4, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
    )  # fmt: skip
    whole, collator = whole_rows(rows), PrefixCollator(tokenizer.pad_token_id)
    makers: dict[str, tuple[type[RewardTrainer], dict[str, Any]]] = {
        _TRL: (RewardTrainer, {"train_dataset": whole}),
        _BASELINE: (PairRewardTrainer, {"train_dataset": whole}),
        **{
            name: (PrefixRewardTrainer, {"train_dataset": causal_rows(rows, count, 0), "data_collator": collator})
            for name, count in (("partial, 10 prefixes a pair", 10), (_ALL, ALL_PREFIXES))
        },
    }
    contestants = {}
    for name, (kind, data) in makers.items():
        trainer = kind(copy.deepcopy(model), config, processing_class=tokenizer, **data)
        if kind is not RewardTrainer:
            weigh_terms(trainer)
        trainer.current_gradient_accumulation_steps = 1
        trainer.create_optimizer()
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        contestants[name] = Contestant(trainer, _endless(trainer))
    return contestants


def _endless(trainer: RewardTrainer) -> Iterator[Any]:
    loader = trainer.get_train_dataloader()
    while True:
        yield from loader


def race(contestants: dict[str, Contestant], rounds: int, title: str, console: Console) -> list[int]:
    """Steps of all in turn; how many tokens those of each round had."""
    rng, tokens = random.Random(0), []
    for _ in track(range(_WARM_UP + rounds), title, console=console):
        order = rng.sample(list(contestants), len(contestants))
        (seen,) = {contestants[name].step() for name in order}
        tokens.append(seen)
    for contestant in contestants.values():
        del contestant.seconds[:_WARM_UP], contestant.processor_seconds[:_WARM_UP]
    return tokens[_WARM_UP:]


def _summarise(contestants: dict[str, Contestant], tokens: Sequence[int]) -> dict[str, Any]:
    baseline = contestants[_BASELINE]
    own = next(iter(contestants.values())).trainer.model
    return {
        "parameters": sum(weight.numel() for weight in own.parameters()),
        "tokens_per_step": statistics.mean(tokens),
        "contestants": {
            name: {
                "seconds_per_step": statistics.median(each.seconds),
                "tokens_per_second": sum(tokens) / sum(each.seconds),
                "over_full": _ratios(each.seconds, baseline.seconds),
                "processor_time_over_full": _ratios(each.processor_seconds, baseline.processor_seconds),
                "seconds": each.seconds,
            }
            for name, each in contestants.items()
        },
    }


def _ratios(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Of the steps of one round, which train on the same rows: median and quartiles."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(own, other, strict=True)], n=4)
    return {"median": middle, "first_quartile": low, "third_quartile": high}


def _table(model: dict[str, Any]) -> dict[str, list[str]]:
    rows = model["contestants"]
    return {
        "trainer": list(rows),
        "ms a step": [f"{1e3 * row['seconds_per_step']:.0f}" for row in rows.values()],
        "tokens/s": [f"{row['tokens_per_second']:.0f}" for row in rows.values()],
        "time over `full`'s": [_ratio(row["over_full"]) for row in rows.values()],
        "processor time over `full`'s": [_ratio(row["processor_time_over_full"]) for row in rows.values()],
    }


def _ratio(ratio: dict[str, float]) -> str:
    if ratio["first_quartile"] == ratio["third_quartile"]:
        return "1"
    return f"{ratio['median']:.3f} ({ratio['first_quartile']:.3f} to {ratio['third_quartile']:.3f})"


_ABOUT = """A step is a batch drawn and put together, forward, backward and AdamW, on one thread. The trainers take a
step in turn on the same pairs, {rounds} rounds; ratios are of the steps of one round, median and quartiles. `full` has
one score a response, `partial` the scores of its prefixes, all read from one forward.
"""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
