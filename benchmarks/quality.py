"""`steersman evaluate`: how good guided answers are, through a server.

With --settings it compares the settings of a YAML file over the prompts of a JSONL file. Without, it compares the demo
world's methods, each at the strength β that is best on tuning prompts, on other prompts.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from steersman.benchmarks.answers import Answers, Server, Summary, ask, connected, summarise
from steersman.benchmarks.common.demo import demo_server
from steersman.benchmarks.common.rendering import BLUE, ORANGE, RED, markdown, terminal
from steersman.benchmarks.common.results import RESULTS, write_json
from steersman.benchmarks.settings import (
    Prompt,
    Setting,
    SettingsError,
    check_models,
    read_prompt_file,
    read_settings,
    world_prompts,
)
from steersman.benchmarks.tables import columns, compare, p_matrix, plot_settings

BETAS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_TUNING, _REPORTING = 60, 400
_DEMO_JUDGE = "judge"
_EXAMPLE = """example of a settings file:
  base: {}
  base, cooler: {temperature: 0.7}
  steered: {guidance: {method: pargs, reward_model: helpful, beta: 2}}
  steered early: {guidance: {method: pargs, reward_model: helpful, beta: 2, gate: {first_tokens: 16}}}
"""


def main(argv: Sequence[str]) -> int:
    """Prints a table and writes JSON, Markdown and PNG; 2 for an error in what the user gave, after one line."""
    args = _parse(argv)
    try:
        if args.settings is None:
            _compare_tuned(args)
        else:
            _compare_settings(args)
    except SettingsError as error:
        print(f"steersman evaluate: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="steersman evaluate",
        description=__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--settings", type=Path, metavar="FILE.yaml", help="NAME: {guidance: {…}, any sampling field}.")
    parser.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help="Rows with prompt or messages.")
    parser.add_argument("--url", help="Address of a running server; without it the demo server is started.")
    parser.add_argument("--model", metavar="NAME", help="Model to ask; by default the first that the server lists.")
    parser.add_argument(
        "--judge", metavar="NAME", help="Reward model that judges answers and steers none; in the demo: judge."
    )
    parser.add_argument("--limit", type=_positive, help=f"Use this many prompts, the first; tuned: {_REPORTING}.")
    parser.add_argument("--samples", type=_positive, default=1, help="Answers to each prompt under each setting.")
    parser.add_argument("--seed", type=int, default=0, help="Other answers by chance.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="Where the results go; by default evaluation/.")
    return parser.parse_args(list(argv))


def _compare_settings(args: argparse.Namespace) -> None:
    settings = read_settings(args.settings)
    prompts = (world_prompts("reporting") if args.prompts is None else read_prompt_file(args.prompts))[: args.limit]
    judge = args.judge or (_DEMO_JUDGE if args.url is None else None)
    with demo_server(args.url) as url:
        answers = asyncio.run(_ask_all(args, url, judge, settings, prompts))
    rows = [summarise(name, given) for name, given in answers.items()]
    tests = compare(answers)
    about = f"{len(prompts)} prompts, {args.samples} answers to each; mean ± standard error over prompts."
    out = args.out or Path("evaluation")
    body = {"prompts": len(prompts), "samples": args.samples, "seed": args.seed, "judge": judge}
    body |= {"settings": [{"name": s.name, "guidance": s.guidance, **s.fields} for s in settings]}
    body |= {"rows": [row.dump() for row in rows], "tests": tests}
    matrices = [m for measure in ("gold", "judge") if len(m := p_matrix(tests, measure)) > 1]
    _write(out / args.settings.stem, body, [columns(rows), *matrices], about)
    plot_settings(rows, out / f"{args.settings.stem}.png")


async def _ask_all(
    args: argparse.Namespace, url: str, judge: str | None, settings: Sequence[Setting], prompts: Sequence[Prompt]
) -> dict[str, Answers]:
    async with connected(url, args.model, judge) as server:
        check_models(settings, judge, server.reward_models, server.policies)
        with progress_bar() as progress:
            return {
                setting.name: await ask_shown(server, setting, prompts, progress, samples=args.samples, seed=args.seed)
                for setting in settings
            }


def progress_bar() -> Progress:
    """How many answers of each setting are there."""
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


async def ask_shown(
    server: Server, setting: Setting, prompts: Sequence[Prompt], progress: Progress, *, samples: int = 1, seed: int = 0
) -> Answers:
    """`ask` under a bar that goes when all answers are there."""
    task = progress.add_task(setting.name, total=len(prompts) * samples)
    answers = await ask(server, setting, prompts, samples=samples, seed=seed, on_answer=lambda: progress.advance(task))
    progress.remove_task(task)
    return answers


@dataclass(frozen=True)
class Candidate:
    """A way of decoding whose β, where it has one, is tuned."""

    family: str
    greedy: bool
    guidance: dict[str, Any] | None = None
    top_k: int = 0

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.family}, {'greedy' if self.greedy else 'sampled'}"

    def at(self, beta: float | None) -> Setting:
        """The setting with a strength, or as it is."""
        fields = {"temperature": 0.0 if self.greedy else 1.0, **({"top_k": self.top_k} if self.top_k else {})}
        name = self.name if beta is None else f"{self.name}, β = {beta:g}"
        return Setting(name, self.guidance if beta is None else {**(self.guidance or {}), "beta": beta}, fields)


def candidates() -> list[Candidate]:
    """What `make evaluate` compares."""
    args = {"method": "args", "reward_model": "full", "top_k": 10}
    pargs = {"method": "pargs", "reward_model": "helpful", "top_k": 10}
    families = {"base": None, "ARGS": args, "ARGS with end token": {**args, "end_token": True}, "PARGS": pargs}
    found = [Candidate(family, greedy, guidance) for greedy in (False, True) for family, guidance in families.items()]
    return [found[0], Candidate("base, top-k 10", False, top_k=10), *found[1:]]


def _compare_tuned(args: argparse.Namespace) -> None:
    for flag in ("prompts", "samples", "seed"):
        if getattr(args, flag) not in (None, 0, 1):
            raise SettingsError(f"--{flag}: needs --settings; the tuned comparison has its own")
    tuning, reporting = world_prompts("tuning")[:_TUNING], world_prompts("reporting")[: args.limit or _REPORTING]
    judge = args.judge or _DEMO_JUDGE
    with demo_server(args.url) as url:
        curves, betas, answers = asyncio.run(_tune_and_report(args, url, judge, tuning, reporting))
    rows = [summarise(name, given) for name, given in answers.items()]
    tests = [test for test in compare(answers) if _by_pargs(test)]
    body = {
        "tuning_prompts": len(tuning),
        "reporting_prompts": len(reporting),
        "rows": [{**row.dump(), "beta": betas[row.name]} for row in rows],
        "tests": tests,
        "curves": {name: [{"beta": beta, **row.dump()} for beta, row in curve] for name, curve in curves.items()},
    }
    p = {test["than"]: f"{test['p']:.1g}" for test in tests if test["by"] == "gold"}
    table = columns(rows)
    table = {
        "decoding": table.pop("setting"),
        "β": ["" if (beta := betas[row.name]) is None else f"{beta:g}" for row in rows],
        **{"gold reward": table.pop("gold reward"), "independent reward model": table.pop("judge")},
        "PARGS better, p": [p.get(row.name, "") for row in rows],
        **table,
    }
    about = (
        f"Mean ± standard error over {len(reporting)} prompts that nothing was tuned on; "
        f"β by gold on {len(tuning)} others."
    )
    out = args.out or RESULTS
    _write(out / "quality", body, [table], about)
    plot_strength(curves, out / "quality.png")


async def _tune_and_report(
    args: argparse.Namespace, url: str, judge: str, tuning: Sequence[Prompt], reporting: Sequence[Prompt]
) -> tuple[dict[str, list[tuple[float, Summary]]], dict[str, float | None], dict[str, Answers]]:
    """Every candidate's curve over β, the β that was chosen, and its answers with that."""
    curves: dict[str, list[tuple[float, Summary]]] = {}
    betas: dict[str, float | None] = {}
    answers: dict[str, Answers] = {}
    async with connected(url, args.model, judge) as server:
        check_models([c.at(None) for c in candidates()], judge, server.reward_models, server.policies)
        with progress_bar() as progress:
            for candidate in candidates():
                beta = None
                if candidate.guidance is not None:
                    curve = []
                    for strength in BETAS:
                        tuned = await ask_shown(server, candidate.at(strength), tuning, progress)
                        curve.append((strength, summarise(candidate.name, tuned)))
                    curves[candidate.name] = curve
                    beta = max(curve, key=lambda point: _gold(point[1]))[0]
                betas[candidate.name] = beta
                answers[candidate.name] = await ask_shown(server, candidate.at(beta), reporting, progress)
    return curves, betas, answers


def _gold(row: Summary) -> float:
    assert row.gold is not None
    return row.gold.mean


def _by_pargs(test: dict[str, Any]) -> bool:
    """PARGS against another way of the same kind, greedy or sampled."""
    return bool(test["better"] == f"PARGS, {test['than'].rpartition(', ')[2]}")


def plot_strength(curves: dict[str, list[tuple[float, Summary]]], path: Path) -> None:
    """Gold and the independent reward over β: both rise, then gold falls off."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    for axis, measure in zip(axes, ("gold", "judge"), strict=True):
        for name, curve in curves.items():
            style = "--" if name.endswith("greedy") else "-"
            colour = {"ARGS": RED, "ARGS with end token": ORANGE, "PARGS": BLUE}[name.split(", ")[0]]
            heights = [getattr(row, measure).mean for _, row in curve]
            axis.plot([beta for beta, _ in curve], heights, style, marker="o", color=colour, label=name)
        axis.set(xscale="log", xlabel="strength β", ylabel=f"mean {measure} reward")
    axes[0].set_title("Gold reward (the truth)")
    axes[1].set_title("Independent reward model")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _write(stem: Path, body: dict[str, Any], tables: Sequence[dict[str, list[str]]], about: str) -> None:
    write_json(stem.with_name(f"{stem.name}.json"), body)
    text = "\n".join([*map(markdown, tables), f"{about}\n"])
    stem.with_name(f"{stem.name}.md").write_text(text, encoding="utf-8")
    console = Console()
    for table in tables:
        console.print(terminal(table))
    console.print(f"{about}\nwritten: {stem}.json, .md and .png", soft_wrap=True)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value
