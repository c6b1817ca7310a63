"""Builds the demo world from nothing: `python -m steersman.training.world.build [--out DIR] [--seed 0]`.

Independent steps run in two processes of one thread each. DIR receives `models/`, `models/quality.json`, `prompts/` and
`test_pairs.jsonl`; what else is made is dropped, or kept in the folder that `--work` names.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from steersman.guidance.head_files import POLICY, REWARD
from steersman.processes import process_pool
from steersman.training import dpo, reward
from steersman.training.checkpoints import add_facts, save_checkpoint
from steersman.training.world.grammar import Split, draw_prompts
from steersman.training.world.language_model import (
    BASE,
    EVALUATION,
    SMALL,
    Shape,
    draw_texts,
    train_language_model,
)
from steersman.training.world.pairs import agreement, draw_pairs, read_rows, write_rows
from steersman.training.world.quality import measure_head, measure_policy, measure_reward, measure_writing
from steersman.training.world.tokenizer import train_tokenizer

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
PAIRS: dict[Split, int] = {"reward": 10_000, "evaluation": 4000, "validation": 800, "test": 800}
PROMPTS: dict[Split, int] = {"tuning": 200, "reporting": 500}
REWARD_MODELS = ("reward-partial", "reward-full", "reward-evaluation", "reward-vocabulary")
# The share of each response's tokens that a policy is trained on: those of Shallow Preference Signals.
HEADS = {"reward-head": REWARD, "dpo-head": POLICY}
HEAD_PAIRS = 3000
"""Of the reward head: with more of them it is better known which answer is chosen, and guides no better."""
POLICIES = {"dpo": 1.0, "dpo-50": 0.5, "dpo-40": 0.4, "dpo-33": 0.33, "dpo-25": 0.25}


@dataclass(frozen=True)
class Folders:
    """Where a build writes: `out` is what ships, `work` the rest."""

    out: Path
    work: Path

    @property
    def models(self) -> Path:
        return self.out / "models"

    @property
    def base(self) -> Path:
        return self.models / "base"

    @property
    def tokenizer(self) -> Path:
        return self.work / "tokenizer"

    def language_model(self, name: str) -> Path:
        return self.base if name == "base" else self.work / f"{name}-language-model"

    def pairs(self, split: Split) -> Path:
        return (self.out if split == "test" else self.work) / f"{split}_pairs.jsonl"


def build(folders: Folders, seed: int) -> dict[str, Any]:
    """Builds everything; returns what `quality.json` holds."""
    start = time.monotonic()
    _quiet_single_thread()
    for folder in (folders.models, folders.work):
        folder.mkdir(parents=True, exist_ok=True)
    with _two_processes() as pool:
        build_tokenizer(folders, seed)
        _build_models(folders, seed, pool.submit)
        build_prompts(folders, seed)
        quality = measure(folders, seed)
    quality["minutes"] = round((time.monotonic() - start) / 60, 1)
    (folders.models / "quality.json").write_text(json.dumps(quality, indent=2) + "\n", encoding="utf-8")
    return quality


def _build_models(folders: Folders, seed: int, submit: Callable[..., Future[Any]]) -> None:
    """Each step is submitted as soon as what it reads is there; two run at a time."""
    base = submit(build_language_model, folders, "base", BASE, seed)
    others = [
        submit(build_language_model, folders, "small", SMALL, seed + 1),
        submit(build_language_model, folders, "evaluation", EVALUATION, seed + 2),
    ]
    base.result()
    pairs = [submit(build_pairs, folders, split, count, seed) for split, count in PAIRS.items()]
    for step in others + pairs:
        step.result()
    policies = [submit(build_policy, folders, name, seed) for name in POLICIES]
    heads = [submit(build_head, folders, name, seed) for name in HEADS]
    for model in [submit(build_reward_model, folders, name, seed) for name in REWARD_MODELS] + policies + heads:
        model.result()


def build_tokenizer(folders: Folders, seed: int) -> None:
    texts = draw_texts("base", 4000, seed)
    train_tokenizer(prompt + response for prompt, response in texts).save_pretrained(folders.tokenizer)


def build_language_model(folders: Folders, name: str, shape: Shape, seed: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders.tokenizer)
    model = train_language_model(shape, tokenizer, seed, name)
    facts = {"kind": "language model", "texts": shape.texts, "learning_rate": shape.learning_rate, "seed": seed}
    save_checkpoint(model, tokenizer, folders.language_model(name), facts, store="bfloat16")


def build_pairs(folders: Folders, split: Split, count: int, seed: int) -> None:
    model, tokenizer = _load_base(folders)
    write_rows(draw_pairs(model, tokenizer, split, count, seed), folders.pairs(split))


def build_reward_model(folders: Folders, name: str, seed: int) -> None:
    """By `steersman train reward`, from the same YAML that users read; only paths and seed are given over it."""
    evaluation = name == "reward-evaluation"
    flags = {
        "config": CONFIGS / f"{name}.yaml",
        "model": folders.language_model("evaluation" if evaluation else "small"),
        "train_file": folders.pairs("evaluation" if evaluation else "reward"),
        "validation_file": folders.pairs("validation"),
        "output_dir": folders.models / name,
        "seed": seed + evaluation,
    }
    _run(f"train reward: {name}", reward.main, flags)


def build_policy(folders: Folders, name: str, seed: int) -> None:
    """By `steersman train dpo`, all from one YAML that users read; paths, seed and the share kept are given over it."""
    flags = {
        "config": CONFIGS / "dpo.yaml",
        "model": folders.base,
        "train_file": folders.pairs("reward"),
        "validation_file": folders.pairs("validation"),
        "output_dir": folders.models / name,
        "keep": POLICIES[name],
        "seed": seed,
    }
    _run(f"train dpo: {name}", dpo.main, flags)


def build_head(folders: Folders, name: str, seed: int) -> None:
    """By `steersman train`, from the YAML that users read; paths and seed are given over it."""
    rows = folders.pairs("reward")
    if HEADS[name] == REWARD:
        rows = folders.work / "head_pairs.jsonl"
        write_rows(read_rows(folders.pairs("reward"))[:HEAD_PAIRS], rows)
    flags = {
        "config": CONFIGS / f"{name}.yaml",
        "model": folders.base,
        "train_file": rows,
        "validation_file": folders.pairs("validation"),
        "output_dir": folders.models / name,
        "seed": seed,
    }
    _run(f"train: {name}", reward.main if HEADS[name] == REWARD else dpo.main, flags)


def _run(what: str, main: Callable[[list[str]], int], flags: dict[str, Any]) -> None:
    # What ships is replaced, and no pictures are added to it.
    flags |= {"overwrite_output_dir": True, "figure": False, "disable_tqdm": True}
    code = main([part for flag, value in flags.items() for part in (f"--{flag}", str(value))])
    if code:
        raise RuntimeError(f"steersman {what} ended with {code}")


def build_prompts(folders: Folders, seed: int) -> None:
    (folders.out / "prompts").mkdir(exist_ok=True)
    for split, count in PROMPTS.items():
        rows = [
            {"prompt": prompt.text, "messages": [{"role": "user", "content": prompt.message}]}
            for prompt in draw_prompts(split, count, seed)
        ]
        write_rows(rows, folders.out / "prompts" / f"{split}.jsonl")


def measure(folders: Folders, seed: int) -> dict[str, Any]:
    """The quality of what was built, on test prompts and test pairs."""
    model, tokenizer = _load_base(folders)
    prompts = draw_prompts("test", 1000, seed + 1)
    test_pairs = read_rows(folders.pairs("test"))
    quality: dict[str, Any] = {
        "seed": seed,
        "base": measure_writing(model, tokenizer, prompts, seed),
        "pairs": {"test": len(test_pairs), "label_agreement": round(agreement(read_rows(folders.pairs("reward"))), 4)},
        "accuracy": {},
        "policies": {},
        "heads": {
            name: measure_head(folders.models / name, role, model, tokenizer, prompts, test_pairs, seed)
            for name, role in HEADS.items()
        },
    }
    for name in REWARD_MODELS:
        quality["accuracy"][name] = measure_reward(folders.models / name, tokenizer, test_pairs)
        add_facts(folders.models / name, {"gold_accuracy": quality["accuracy"][name]})
    for name in POLICIES:
        quality["policies"][name] = measure_policy(folders.models / name, model, tokenizer, prompts, test_pairs, seed)
        add_facts(folders.models / name, {"gold_accuracy": quality["policies"][name]["accuracy"]})
    return quality


def _load_base(folders: Folders) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    model = AutoModelForCausalLM.from_pretrained(folders.base, dtype="float32")
    return model.eval(), AutoTokenizer.from_pretrained(folders.base)


def _two_processes() -> AbstractContextManager[ProcessPoolExecutor]:
    # Two threads that spin on shared cores fall far below one; a waiting thread must sleep.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    return process_pool(2, _quiet_single_thread)


def _quiet_single_thread() -> None:
    torch.set_num_threads(1)
    disable_progress_bar()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m steersman.training.world.build", description="Builds the demo world."
    )
    parser.add_argument("--out", type=Path, default=HERE, help="where models/ and prompts/ go (default: the package)")
    parser.add_argument("--work", type=Path, help="keep pairs and language models here (default: nowhere)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folders = Folders(arguments.out, arguments.work or Path(temporary))
        print(json.dumps(build(folders, arguments.seed), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
