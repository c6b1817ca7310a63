"""`python -m steersman.benchmarks.objectives`: every objective's reward models and policies, trained and decoded with.

Three seeds; a seed draws preference pairs of its own, on which every model of that seed is trained, for as many epochs.
Strengths are tuned on other prompts than reported. Beside them TRL's own trainers.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from steersman.benchmarks import objective_tables
from steersman.benchmarks.answers import Answer, Answers, Server, connected, summarise
from steersman.benchmarks.common.demo import demo_server
from steersman.benchmarks.common.results import RESULTS
from steersman.benchmarks.objective_tables import METHODS, Measured, Method
from steersman.benchmarks.plain_trl import PlainRun
from steersman.benchmarks.quality import BETAS, ask_shown, progress_bar
from steersman.benchmarks.runs import Pairs, Run, SmallLanguageModel, finish, one_thread
from steersman.benchmarks.settings import Setting, world_prompts
from steersman.benchmarks.sweep import BASE
from steersman.demo import MODELS, WORLD
from steersman.processes import process_pool
from steersman.training.world.pairs import read_rows
from steersman.training.world.quality import measure_implicit_reward, measure_reward

SEEDS = (0, 1, 2)
_PORT, _TUNING = 8034, 60


def main(argv: Sequence[str]) -> int:
    """Writes RESULTS/objectives.* and RESULTS/truncation.*."""
    parser = argparse.ArgumentParser(prog="python -m steersman.benchmarks.objectives", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="Keep what is trained here, and use what is there.")
    parser.add_argument("--pairs", type=int, default=4000, help="Preference pairs of each seed.")
    parser.add_argument("--prompts", type=int, default=100, help="Prompts of each seed.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(list(argv))
    with progress_bar() as progress:
        pairs = [Pairs(_pairs(args.work, seed), args.pairs, seed) for seed in SEEDS]
        finish([SmallLanguageModel(args.work), *pairs], progress, "language model and pairs")
        for taught in (False, True):
            finish(_runs(args.work, taught), progress, "training, by a teacher" if taught else "training")
    accuracy = _measure(args.work)
    betas, answers = _decode(args.work, args.prompts)
    for stem, finding in objective_tables.find(Measured(accuracy, betas, answers)).items():
        finding.write(args.out / stem, Console())
    return 0


def _folder(work: Path, folder: str, seed: int) -> Path:
    """Where a model of a seed lies."""
    return work / f"seed{seed}" / folder


def _pairs(work: Path, seed: int) -> Path:
    return work / f"seed{seed}" / "pairs.jsonl"


def _runs(work: Path, taught: bool) -> list[Run]:
    """One for each model, by a teacher or not."""
    methods = {method.folder: method for method in METHODS.values() if (method.teacher is not None) == taught}
    return [_run(work, method, seed) for seed in SEEDS for method in methods.values()]


def _run(work: Path, method: Method, seed: int) -> Run:
    start = SmallLanguageModel(work).path if method.kind == "reward" else MODELS / "base"
    flags: dict[str, Any] = {"model": start, "train_file": _pairs(work, seed), "validation_file": "", "seed": seed}
    if method.teacher is not None:
        flags |= {"teacher": _folder(work, method.teacher, seed), "policy": MODELS / "base"}
    kind: type[Run] = PlainRun if method.trl else Run
    return kind(method.kind, method.config, _folder(work, method.folder, seed), flags | dict(method.flags))


def _measure(work: Path) -> dict[str, list[dict[str, float]]]:
    """Method → for each seed, share of the longer response → accuracy against gold order, on the demo's test pairs."""
    jobs = [(work, name, seed) for name in METHODS for seed in SEEDS]
    with process_pool(2, one_thread) as pool:
        found = list(pool.map(_accuracy, *zip(*jobs, strict=True)))
    seeds = len(SEEDS)
    return {name: found[n * seeds : (n + 1) * seeds] for n, name in enumerate(METHODS)}


def _accuracy(work: Path, name: str, seed: int) -> dict[str, float]:
    kept = _folder(work, METHODS[name].folder, seed) / "gold-accuracy.json"
    if not kept.exists():
        kept.write_text(json.dumps(_measure_accuracy(work, name, seed)), encoding="utf-8")
    found: dict[str, float] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def _measure_accuracy(work: Path, name: str, seed: int) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    folder, rows = _folder(work, METHODS[name].folder, seed), read_rows(WORLD / "test_pairs.jsonl")
    if METHODS[name].kind == "reward":
        return measure_reward(folder, tokenizer, rows)
    base = AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype="float32").eval()
    return measure_implicit_reward(folder, base, tokenizer, rows)


def _decode(work: Path, count: int) -> tuple[dict[str, float | None], dict[str, list[Answers]]]:
    """Each method's strength, chosen with the first seed's model, and each seed's answers with it."""
    betas: dict[str, float | None] = {}
    answers: dict[str, list[Answers]] = {}
    for seed in SEEDS:
        kept = work / f"seed{seed}" / f"answers-{count}.json"
        if not kept.exists():
            found = asyncio.run(_decode_seed(work, seed, count, betas))
            kept.write_text(json.dumps(found), encoding="utf-8")
        found = json.loads(kept.read_text(encoding="utf-8"))
        betas = found["betas"]
        for name, given in found["answers"].items():
            answers.setdefault(name, []).append([[Answer(**sample) for sample in row] for row in given])
    return betas, answers


async def _decode_seed(work: Path, seed: int, count: int, betas: dict[str, float | None]) -> dict[str, Any]:
    """Answers of one seed's models; without strengths, they are tuned before."""
    prompts = world_prompts("reporting")[seed * count : (seed + 1) * count]
    with (
        demo_server(None, _PORT, [*_flags(work, seed), "--guidance-cache", "1"]) as url,
        progress_bar() as progress,
    ):
        async with connected(url, judge="judge") as server:
            betas = betas or {name: await _tune(server, name, progress) for name in METHODS}
            settings = (BASE, *(_setting(name, betas[name]) for name in METHODS))
            given = {s.name: await ask_shown(server, s, prompts, progress, seed=seed) for s in settings}
    rows = {name: [[asdict(sample) for sample in row] for row in answers] for name, answers in given.items()}
    return {"betas": betas, "answers": rows}


def _flags(work: Path, seed: int) -> list[str]:
    flags = {"reward": "--reward-model", "dpo": "--policy"}
    kinds = {method.folder: flags[method.kind] for method in METHODS.values()}
    return [part for name, flag in kinds.items() for part in (flag, f"{_served(name)}={_folder(work, name, seed)}")]


def _served(folder: str) -> str:
    """The server's name for a model of a seed; the demo's own models are there too."""
    return f"trained-{folder}"


async def _tune(server: Server, name: str, progress: Any) -> float | None:
    """The strength of most gold on tuning prompts; None for a policy."""
    if METHODS[name].kind != "reward":
        return None
    tuning, golds = world_prompts("tuning")[:_TUNING], {}
    for beta in BETAS:
        found = summarise(name, await ask_shown(server, _setting(name, beta), tuning, progress))
        assert found.gold is not None
        golds[beta] = found.gold.mean
    return max(golds, key=lambda beta: golds[beta])


def _setting(name: str, beta: float | None) -> Setting:
    method = METHODS[name]
    if beta is None:
        return Setting(name, {"method": "mixed", "policy": _served(method.folder), "mix": 1.0})
    guidance = {"method": "pargs", "reward_model": _served(method.folder), "top_k": 10, "beta": beta}
    return Setting(name, guidance | ({"end_token": True} if method.end_token else {}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
