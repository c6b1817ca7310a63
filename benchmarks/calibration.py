"""Lemma 2 and Theorem 1 of PARGS where the truth can be enumerated: `python -m steersman.benchmarks.calibration`.

Partial and full reward models are trained by `steersman train reward` on labelled pairs of a small world, three seeds
each. Lemma 2: σ(r(y1 cut at i) − r(y2 cut at j)) is P(y1 preferred | both prefixes). Theorem 1: what a full model gives
a prefix is arbitrary. Writes RESULTS/calibration.json, .md and .png.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForSequenceClassification
from trl.trainer.reward_config import RewardConfig

from steersman.benchmarks.calibration_error import Rewards
from steersman.benchmarks.calibration_report import Kind, report
from steersman.benchmarks.common.results import RESULTS
from steersman.benchmarks.enumerable import PROMPT, Prefix, World, save_start
from steersman.training.accuracy import score_ends
from steersman.training.outputs import token_scores
from steersman.training.reward import train_reward
from steersman.training.rewards.arguments import Objective, RewardArguments
from steersman.training.rewards.losses import regression

SEEDS = (0, 1, 2)
PAIRS = 8000


def train(world: World, folder: Path, objective: Objective, seed: int, pairs: int, epochs: int) -> Path:
    """A reward model by `steersman train reward` from a start and pairs that belong to the seed; 100 steps an epoch."""
    start, rows, out = folder / f"start-{seed}", folder / f"pairs-{seed}.jsonl", folder / f"{objective}-{seed}"
    save_start(start, seed)
    world.write_pairs(rows, pairs, seed)
    config = RewardConfig(
        str(out), num_train_epochs=epochs, per_device_train_batch_size=pairs // 100, learning_rate=3e-3, seed=seed,
        lr_scheduler_type="cosine", warmup_steps=0.05, weight_decay=0.0, max_length=32, report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    arguments = RewardArguments(str(start), str(rows), objective=objective)
    if objective == "partial":
        arguments.prefixes, arguments.prefixes_per_pair = "causal", len(world.cuts)
    train_reward(arguments, config)
    return out


def read_rewards(world: World, folder: Path) -> Rewards:
    """What a reward model gives every prefix."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    cuts = [world.prefixes(cut) for cut in world.cuts]
    known = list(dict.fromkeys(prefix for prefixes in cuts for prefix in prefixes))
    scores = dict(zip(known, score_ends(model, [[*PROMPT, *prefix] for prefix in known], 512).tolist(), strict=True))
    return [np.array([scores[prefix] for prefix in prefixes]) for prefixes in cuts]


def reverse_prefixes(world: World, folder: Path, out: Path, steps: int = 400) -> None:
    """Theorem 1's proof as weights: the model trained on until its whole answers score as before, and every unfinished
    prefix scores minus what would be right. The full model's loss reads whole answers, so it is what it was."""
    wanted: dict[Prefix, float] = {}
    for cut in world.cuts:
        for prefix, reward in zip(world.prefixes(cut), world.best_rewards(cut).tolist(), strict=True):
            wanted.setdefault(prefix, -reward)
    whole = world.prefixes(world.cuts[-1])
    wanted |= dict(zip(whole, read_rewards(world, folder)[-1].tolist(), strict=True))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    ids, targets, kept = _as_batch(whole, wanted)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        with token_scores(model) as scores:
            model(input_ids=ids, attention_mask=(ids > 0).long())
        regression(scores[0][..., 0], targets, kept).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(out)


def _as_batch(whole: Sequence[Prefix], wanted: dict[Prefix, float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [N, T], and at each token the reward wanted there and whether there is one."""
    length = max(map(len, whole))
    ids = torch.tensor([[*PROMPT, *prefix, *[0] * (length - len(prefix))] for prefix in whole])
    targets = [[0.0] + [wanted[p[:n]] for n in range(1, len(p) + 1)] + [0.0] * (length - len(p)) for p in whole]
    kept = ids > 0
    kept[:, 0] = False
    return ids, torch.tensor(targets), kept


def measure(
    world: World, folder: Path, pairs: int, seeds: Sequence[int] = SEEDS, epochs: int = 3
) -> tuple[Kind, Kind, Rewards]:
    """A partial and a full model for each seed, and the rewards of the first full one with its prefixes reversed."""
    found: dict[Objective, list[Rewards]] = {"partial": [], "full": []}
    for seed in track(seeds, "training"):
        for objective, rewards in found.items():
            rewards.append(read_rewards(world, train(world, folder, objective, seed, pairs, epochs)))
    reverse_prefixes(world, folder / f"full-{seeds[0]}", folder / "reversed")
    partial, full = (Kind(name, world, rewards) for name, rewards in found.items())
    return partial, full, read_rewards(world, folder / "reversed")


def main(argv: Sequence[str]) -> int:
    """Trains, compares and writes the result."""
    parser = argparse.ArgumentParser(prog="python -m steersman.benchmarks.calibration", description=__doc__)
    parser.add_argument("--pairs", type=int, default=PAIRS, help="Labelled pairs that each model is trained on.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(list(argv))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(World(), Path(folder), args.pairs)
    report(*found, args.pairs).write(args.out / "calibration", Console())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
