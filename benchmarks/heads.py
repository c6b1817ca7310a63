"""`python -m steersman.benchmarks.heads`: heads trained on few pairs and decoded with, without a server.

Three seeds; a seed draws preference pairs of its own, on which every head of that seed is trained. Every strength is
reported, on prompts that none was tuned on; the best one is chosen with seed 0 on tuning prompts. About 20 minutes of
one core; what is there is not done again.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from steersman.benchmarks.common.rendering import markdown, terminal
from steersman.benchmarks.common.results import RESULTS, write_json
from steersman.benchmarks.quality import progress_bar
from steersman.benchmarks.runs import Pairs, Run, finish, logged, one_thread
from steersman.benchmarks.settings import world_prompts
from steersman.demo import MODELS
from steersman.guidance.head_files import POLICY, REWARD, read_head
from steersman.guidance.heads import Head
from steersman.training.heads.guides import Greedy, PolicyGuide, RewardGuide
from steersman.training.world import gold
from steersman.training.world.sampling import sample

SEEDS = (0, 1, 2)
_TUNING = 150


@dataclass(frozen=True)
class Kind:
    """A way to train a head, and the strengths it is decoded with: β of rewards, the mix of policies."""

    role: str
    config: str
    strengths: tuple[float, ...]
    flags: Mapping[str, Any] = field(default_factory=dict)


_BETAS, _MIXES = (1.0, 2.0, 3.0, 4.0, 6.0), (0.25, 0.5, 1.0)
KINDS = {
    "reward head, pairs": Kind(REWARD, "reward-head.yaml", _BETAS),
    "DPO head": Kind(POLICY, "dpo-head.yaml", _MIXES),
    "reward head, ratings": Kind(REWARD, "reward-head.yaml", _BETAS, {"head_target": "ratings"}),
}


@dataclass(frozen=True)
class Measured:
    """Mean gold of answers, sampled at temperature 1 and greedy."""

    sampled: float
    greedy: float


@dataclass(frozen=True)
class World:
    """The base, and prompts by split."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast

    @torch.inference_mode()
    def measure(self, head: Head, role: str, strength: float, prompts: Sequence[str], seed: int) -> Measured:
        """Of the base's answers under a head."""
        guide = RewardGuide(head, strength) if role == REWARD else PolicyGuide(head, strength)
        golds = []
        for guided in (guide, Greedy(guide)):
            drawn = sample(self.model, self.tokenizer, prompts, seed, "answers", guide=guided)
            texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in drawn]
            totals = [gold.score(prompt, text).total for prompt, text in zip(prompts, texts, strict=True)]
            golds.append(statistics.fmean(totals))
        return Measured(*golds)


@dataclass(frozen=True)
class Job:
    """The training of one seed's head, with the seconds of one core that it took."""

    run: Run

    @property
    def seconds(self) -> Path:
        """The file that holds them."""
        return self.run.folder.with_suffix(".seconds")

    def train(self) -> float:
        """Trains the head unless it is there; the seconds."""
        if not self.seconds.exists():
            began = time.process_time()
            self.run()
            self.seconds.write_text(str(time.process_time() - began))
        return float(self.seconds.read_text())


def main(argv: Sequence[str]) -> int:
    """Writes RESULTS/heads.json and .md."""
    parser = argparse.ArgumentParser(prog="python -m steersman.benchmarks.heads", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="Keep what is trained here, and use what is there.")
    parser.add_argument("--pairs", type=int, default=2500, help="Preference pairs of each seed.")
    parser.add_argument("--prompts", type=int, default=300, help="Prompts that are answered with each head.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(list(argv))
    one_thread()
    world = World(
        AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype="float32").eval(),
        AutoTokenizer.from_pretrained(MODELS / "base"),
    )
    pairs = {seed: Pairs(args.work / f"seed{seed}" / "pairs.jsonl", args.pairs, seed) for seed in SEEDS}
    with progress_bar() as progress:
        finish(list(pairs.values()), progress, "pairs")
        found = _measure(args, world, pairs, progress)
    rows = table(found)
    Console().print(terminal(rows, "Heads"))
    body = {"pairs": args.pairs, "prompts": args.prompts, "heads": found}
    write_json(args.out / "heads.json", body)
    caption = (
        f"Mean ± standard error over {len(SEEDS)} seeds, each with {args.pairs} pairs of its own and answers to the "
        f"same {args.prompts} prompts. Bold: the best strength with seed 0 on {_TUNING} other prompts, sampled. "
        "Seconds are of one core, from reading the pairs to the file, the base's hidden states included."
    )
    (args.out / "heads.md").write_text(f"# Heads on the base's own hidden states\n\n{markdown(rows)}\n{caption}\n")
    return 0


def _measure(args: argparse.Namespace, world: World, pairs: Mapping[int, Pairs], progress: Progress) -> dict[str, Any]:
    """Kind → its best strength, the seconds of training by seed, and gold by strength and seed."""
    prompts = {
        split: [str(prompt.text) for prompt in world_prompts(split)[:count]]
        for split, count in (("tuning", _TUNING), ("reporting", args.prompts))
    }
    task = progress.add_task("heads", total=len(KINDS) * len(SEEDS))
    found: dict[str, Any] = {}
    for name, kind in KINDS.items():
        golds: dict[str, list[dict[str, float]]] = {f"{strength:g}": [] for strength in kind.strengths}
        seconds, best = [], ""
        for seed in SEEDS:
            folder = args.work / f"seed{seed}" / name.replace(", ", "-").replace(" ", "-")
            flags = {"model": MODELS / "base", "train_file": pairs[seed].path, "seed": seed, **kind.flags}
            run = Run("reward" if kind.role == REWARD else "dpo", kind.config, folder, {**flags, "figure": False})
            seconds.append(Job(run).train())
            if seed == SEEDS[0]:
                tuned = _decode(world, kind, folder, "tuning", prompts["tuning"], seed)
                best = max(tuned, key=lambda strength: tuned[strength]["sampled"])
            for strength, measured in _decode(world, kind, folder, "reporting", prompts["reporting"], seed).items():
                golds[strength].append(measured)
            progress.advance(task)
        found[name] = {"best": best, "seconds": seconds, "gold": golds}
    return found


def _decode(
    world: World, kind: Kind, folder: Path, split: str, prompts: Sequence[str], seed: int
) -> dict[str, dict[str, float]]:
    """Strength → mean gold, sampled and greedy."""
    kept = folder.with_suffix(f".{split}-{len(prompts)}.json")
    if not kept.exists():
        head = read_head(folder.name, folder, kind.role).head
        with logged(folder.with_suffix(".log")):
            golds = {f"{b:g}": asdict(world.measure(head, kind.role, b, prompts, seed)) for b in kind.strengths}
        kept.write_text(json.dumps(golds), encoding="utf-8")
    found: dict[str, dict[str, float]] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def table(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """Headings and cells, a row for each kind and strength."""
    cells: dict[str, list[str]] = {"head": [], "β or mix": [], "gold, sampled": [], "gold, greedy": [], "seconds": []}
    for name, kind in found.items():
        for strength, golds in kind["gold"].items():
            shown = f"**{strength}**" if strength == kind["best"] else strength
            columns = [_estimate([row[way] for row in golds]) for way in ("sampled", "greedy")]
            seconds = f"{statistics.fmean(kind['seconds']):.0f}"
            for column, cell in zip(cells.values(), (name, shown, *columns, seconds), strict=True):
                column.append(cell)
    return cells


def _estimate(values: Sequence[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.2f} ± {error:.2f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
