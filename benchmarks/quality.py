"""`steersman evaluate`: how good guided answers are, through a server; tuned on some prompts, reported on others."""

import argparse
import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy import stats

from steersman.benchmarks.common import RESULTS, demo_server, read_prompts, write_json
from steersman.training.world import gold

BETAS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_CONCURRENCY = 32
_MAX_TOKENS = 200
_JUDGE = "judge"


@dataclass(frozen=True)
class Setting:
    """One way of decoding."""

    name: str
    greedy: bool
    guidance: dict[str, Any] | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    def at(self, beta: float) -> "Setting":
        """The same with another strength."""
        return replace(self, guidance={**(self.guidance or {}), "beta": beta})


def _settings(greedy: bool) -> list[Setting]:
    kind = "greedy" if greedy else "sampled"
    args = {"method": "args", "reward_model": "full", "top_k": 10}
    plain = [] if greedy else [Setting("base, top-k 10", greedy, None, {"top_k": 10})]
    return [
        Setting(f"base, {kind}", greedy),
        *plain,
        Setting(f"ARGS, {kind}", greedy, args),
        Setting(f"ARGS with end token, {kind}", greedy, {**args, "end_token": True}),
        Setting(f"PARGS, {kind}", greedy, {"method": "pargs", "reward_model": "helpful", "top_k": 10}),
    ]


SETTINGS = [*_settings(greedy=False), *_settings(greedy=True)]


@dataclass(frozen=True)
class Answer:
    """One answer and what it is worth."""

    text: str
    gold: float
    judge: float
    kl: float | None
    finished: bool


def main(argv: Sequence[str]) -> int:
    """Tunes β on the tuning prompts and reports on the others; prints a table, writes JSON, Markdown and PNG."""
    parser = argparse.ArgumentParser(prog="steersman evaluate", description=__doc__)
    parser.add_argument("--url", help="Address of a running demo server; without it one is started.")
    parser.add_argument("--tuning", type=int, default=60, help="Tuning prompts.")
    parser.add_argument("--reporting", type=int, default=400, help="Reporting prompts.")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    args = parser.parse_args(list(argv))
    with demo_server(args.url) as url:
        result = asyncio.run(
            evaluate(url, read_prompts("tuning")[: args.tuning], read_prompts("reporting")[: args.reporting])
        )
    write_json(args.out, result)
    markdown = to_markdown(result)
    args.out.with_suffix(".md").write_text(markdown)
    plot(result, args.out.with_suffix(".png"))
    _print(result)
    return 0


async def evaluate(url: str, tuning: list[str], reporting: list[str]) -> dict[str, Any]:
    """Every setting with its best β, and the whole curve over β."""
    timeout = aiohttp.ClientTimeout(total=None)
    curves: dict[str, list[dict[str, float]]] = {}
    answers: dict[str, list[Answer]] = {}
    chosen: dict[str, float | None] = {}
    guided = [s for s in SETTINGS if s.guidance is not None]
    async with aiohttp.ClientSession(url, timeout=timeout) as session:
        with Progress() as progress:
            task = progress.add_task("tuning β", total=len(guided) * len(BETAS))
            for setting in guided:
                curves[setting.name] = []
                for beta in BETAS:
                    rows = await _answers(session, setting.at(beta), tuning)
                    curves[setting.name].append({"beta": beta, **_means(rows)})
                    progress.advance(task)
            task = progress.add_task("reporting", total=len(SETTINGS))
            for setting in SETTINGS:
                beta_chosen: float | None = None
                tuned = setting
                if setting.guidance is not None:
                    beta_chosen = max(curves[setting.name], key=lambda point: point["gold"])["beta"]
                    tuned = setting.at(beta_chosen)
                chosen[setting.name] = beta_chosen
                answers[setting.name] = await _answers(session, tuned, reporting)
                progress.advance(task)
    return {
        "tuning_prompts": len(tuning),
        "reporting_prompts": len(reporting),
        "rows": [{"name": name, "beta": chosen[name], **_summary(rows)} for name, rows in answers.items()],
        "tests": _tests(answers),
        "curves": curves,
    }


async def _answers(session: aiohttp.ClientSession, setting: Setting, prompts: Sequence[str]) -> list[Answer]:
    gate = asyncio.Semaphore(_CONCURRENCY)

    async def one(number: int, prompt: str) -> Answer:
        body: dict[str, Any] = {
            "model": "demo",
            "prompt": prompt,
            "max_tokens": _MAX_TOKENS,
            "temperature": 0.0 if setting.greedy else 1.0,
            "seed": number,
            **setting.fields,
        }
        if setting.guidance is not None:
            body["guidance"] = setting.guidance
        async with gate:
            choice = (await _post(session, "/v1/completions", body))["choices"][0]
            text, finished = choice["text"], choice["finish_reason"] == "stop"
            wanted = {"model": _JUDGE, "prompt": prompt, "responses": [text], "end_token": finished}
            judged = await _post(session, "/v1/rewards", wanted)
        kl = None if choice.get("guidance") is None else choice["guidance"]["kl"]
        return Answer(text, gold.score(prompt, text).total, judged["data"][0]["reward"], kl, finished)

    return list(await asyncio.gather(*(one(n, p) for n, p in enumerate(prompts))))


async def _post(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with session.post(path, json=body) as response:
        if response.status != 200:
            raise RuntimeError(await response.text())
        return dict(await response.json())


def _means(rows: Sequence[Answer]) -> dict[str, float]:
    return {"gold": statistics.fmean(a.gold for a in rows), "judge": statistics.fmean(a.judge for a in rows)}


def _summary(rows: Sequence[Answer]) -> dict[str, Any]:
    kls = [a.kl for a in rows if a.kl is not None]
    return {
        **_means(rows),
        "gold_standard_error": statistics.stdev(a.gold for a in rows) / len(rows) ** 0.5,
        "judge_standard_error": statistics.stdev(a.judge for a in rows) / len(rows) ** 0.5,
        "kl": statistics.fmean(kls) if kls else None,
        "distinct": len({a.text for a in rows}),
        "finished": statistics.fmean(a.finished for a in rows),
    }


def _tests(answers: dict[str, list[Answer]]) -> list[dict[str, Any]]:
    """PARGS against each other setting of its kind: one-sided Wilcoxon signed-rank tests over the same prompts."""
    tests = []
    for setting in SETTINGS:
        best = f"PARGS, {'greedy' if setting.greedy else 'sampled'}"
        if setting.name == best:
            continue
        for measure in ("gold", "judge"):
            pairs = zip(answers[best], answers[setting.name], strict=True)
            differences = [getattr(a, measure) - getattr(b, measure) for a, b in pairs]
            p = float(stats.wilcoxon(differences, alternative="greater").pvalue) if any(differences) else 1.0
            mean = statistics.fmean(differences)
            tests.append({"better": best, "than": setting.name, "by": measure, "difference": mean, "p": p})
    return tests


def to_markdown(result: dict[str, Any]) -> str:
    """The table of the README."""
    lines = ["| decoding | β | gold reward | independent reward model | PARGS better, p | finished | distinct |"]
    lines.append("|---|---|---|---|---|---|---|")
    p_values = {t["than"]: t["p"] for t in result["tests"] if t["by"] == "gold"}
    for row in result["rows"]:
        p = p_values.get(row["name"])
        lines.append(
            f"| {row['name']} | {'' if row['beta'] is None else format(row['beta'], 'g')} "
            f"| {row['gold']:.2f} ± {row['gold_standard_error']:.2f} "
            f"| {row['judge']:.2f} ± {row['judge_standard_error']:.2f} "
            f"| {'' if p is None else format(p, '.1g')} | {row['finished']:.0%} | {row['distinct']} |"
        )
    count = f"{result['reporting_prompts']} prompts that nothing was tuned on"
    return (
        "\n".join([*lines, "", f"Mean ± standard error over {count}; β by gold on {result['tuning_prompts']} others."])
        + "\n"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Gold and the independent reward over β: both rise, then gold falls off."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    for axis, measure in zip(axes, ("gold", "judge"), strict=True):
        for name, curve in result["curves"].items():
            style = "--" if name.endswith("greedy") else "-"
            colour = {"ARGS": "#e76f51", "ARGS with end token": "#f4a261", "PARGS": "#2a6f97"}[name.split(", ")[0]]
            axis.plot(
                [c["beta"] for c in curve], [c[measure] for c in curve], style, marker="o", color=colour, label=name
            )
        axis.set(xscale="log", xlabel="strength β", ylabel=f"mean {measure} reward")
    axes[0].set_title("Gold reward (the truth)")
    axes[1].set_title("Independent reward model")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _print(result: dict[str, Any]) -> None:
    table = Table("decoding", "β", "gold", "judge", "KL", "finished", "distinct")
    for row in result["rows"]:
        table.add_row(
            row["name"],
            "" if row["beta"] is None else f"{row['beta']:g}",
            f"{row['gold']:.2f} ± {row['gold_standard_error']:.2f}",
            f"{row['judge']:.2f} ± {row['judge_standard_error']:.2f}",
            "" if row["kl"] is None else f"{row['kl']:.1f}",
            f"{row['finished']:.0%}",
            str(row["distinct"]),
        )
    console = Console()
    console.print(table)
    for test in result["tests"]:
        console.print(
            f"{test['better']} over {test['than']} by {test['by']}: {test['difference']:+.2f}, p = {test['p']:.1g}"
        )
