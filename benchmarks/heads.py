"""`python -m steersman.benchmarks.heads`: heads beside models of their own trained on the same pairs, decoded with.

Reward heads beside reward models that read candidates or have a vocabulary head, policy heads beside DPO of the whole
model: gold of sampled and of greedy answers, and the frontier of gold over the KL from the base; what a KL budget does
where a head over-optimises; other targets and losses of heads. A seed draws preference pairs of its own, on which every
model of that seed is trained. Strengths are tuned with seed 0 on other prompts than reported. No server is needed:
`transformers.generate` decodes, one thread. About an hour of one core; what is there is not done again.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

from steersman.benchmarks.answers import Answer, Answers
from steersman.benchmarks.common.results import RESULTS
from steersman.benchmarks.head_kinds import BUDGETED, MODEL, OTHERS, PARTS, SEEDS, Kind, pairs_of
from steersman.benchmarks.head_tables import Best, Found, find, greedily
from steersman.benchmarks.offline import Guided, load_guided
from steersman.benchmarks.quality import progress_bar
from steersman.benchmarks.runs import Job, SmallLanguageModel, logged, one_thread
from steersman.benchmarks.settings import Prompt, Setting, world_prompts
from steersman.benchmarks.sweep import BASE, of_seed

_TUNING = 100
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Study:
    """What is trained and decoded under a folder."""

    work: Path
    prompts: int
    """Reported ones."""
    kinds: tuple[Kind, ...]
    progress: Progress

    def train(self) -> None:
        """Trains what is not there, one after the other: a process beside it would be another thread."""
        for job in self._shown(list(self._jobs()), "training"):
            if not job.done:
                job()

    def _jobs(self) -> Iterator[Job]:
        teachers = [kind.teacher for kind in self.kinds if kind.teacher is not None]
        wanted = [(kind, seed) for kind in (*teachers, *self.kinds) for seed in kind.seeds]
        trained = [(kind, seed) for kind, seed in wanted if kind.shipped is None or seed != 0]
        if any(kind.from_small for kind, _ in trained):
            yield SmallLanguageModel(self.work)
        yield from dict.fromkeys(pairs_of(self.work, kind.pairs, seed) for kind, seed in trained)
        for kind, seed in trained:
            yield kind.run(self.work, seed)

    def decode(self) -> Found:
        """Every kind's strengths, tuned with each seed's model, and the answers of all seeds."""
        found = Found({BASE.name: [self._base(seed) for seed in SEEDS]}, {}, self.kinds)
        for kind in self._shown(self.kinds, "answers"):
            decoders = [Decoder(self, kind, seed) for seed in kind.seeds]
            best = found.best[kind.name] = tuple(decoder.tune() for decoder in decoders)
            settings = dict(zip(kind.curve.values, kind.curve.settings(MODEL), strict=True))
            for name, chosen in (
                (kind.tuned, [settings[own.sampled] for own in best]),
                (greedily(kind.tuned), [greedy(settings[own.greedy]) for own in best]),
            ):
                found.sweep[name] = [
                    decoder.answer("reporting", setting) for decoder, setting in zip(decoders, chosen, strict=True)
                ]
            for setting in self._frontier(kind):
                found.sweep[setting.name] = [decoder.answer("reporting", setting) for decoder in decoders]
        return found

    def _frontier(self, kind: Kind) -> list[Setting]:
        """What beside its best strengths is decoded with a kind."""
        if kind in OTHERS:
            return []
        return kind.curve.settings(MODEL) + (kind.budgets.settings(MODEL) if kind in BUDGETED else [])

    def _base(self, seed: int) -> Answers:
        return Decoder(self, None, seed).answer("reporting", BASE)

    def _shown(self, items: Sequence[_Item], what: str) -> Iterator[_Item]:
        task = self.progress.add_task(what, total=len(items))
        for item in items:
            yield item
            self.progress.advance(task)


@dataclass(frozen=True)
class Decoder:
    """The answers of one model, kept in files."""

    study: Study
    kind: Kind | None
    """None for the base alone."""
    seed: int
    load: Callable[..., Guided] = field(default=load_guided, repr=False)

    @cached_property
    def guided(self) -> Guided:
        """The base with the model."""
        models = {} if self.kind is None else {MODEL: self.kind.path(self.study.work, self.seed)}
        return self.load(models, {}) if self.kind is None or self.kind.is_reward else self.load({}, models)

    def tune(self) -> Best:
        """The strengths of most gold on tuning prompts."""
        assert self.kind is not None
        settings = dict(zip(self.kind.curve.values, self.kind.curve.settings(MODEL), strict=True))
        golds = {
            value: [of_seed(self.answer("tuning", s), "gold") for s in (setting, greedy(setting))]
            for value, setting in settings.items()
        }
        return Best(*(max(golds, key=lambda value: golds[value][way]) for way in (0, 1)))

    def answer(self, split: str, setting: Setting) -> Answers:
        """One answer to each prompt of a split."""
        prompts: Sequence[Prompt] = world_prompts(split)[: _TUNING if split == "tuning" else self.study.prompts]
        folder = self.study.work / f"seed{self.seed}" / f"{split}-{len(prompts)}"
        kept = folder / f"{setting.name}.json"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with logged(folder / "decoding.log"):
                given = self.guided.answer(setting, prompts, self.seed)
            self.study.progress.console.print(f"seed {self.seed}, {split}: {setting.name}", soft_wrap=True)
            unfinished = kept.with_suffix(".unfinished")
            unfinished.write_text(json.dumps([[asdict(answer) for answer in row] for row in given]), encoding="utf-8")
            unfinished.replace(kept)
        return [[Answer(**sample) for sample in row] for row in json.loads(kept.read_text(encoding="utf-8"))]


def greedy(setting: Setting) -> Setting:
    """The same, decoded greedily."""
    return Setting(greedily(setting.name), setting.guidance, {"temperature": 0.0})


def main(argv: Sequence[str]) -> int:
    """Writes RESULTS/heads.json, .md and .png."""
    parser = argparse.ArgumentParser(prog="python -m steersman.benchmarks.heads", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="Keep what is trained here, and use what is there.")
    parser.add_argument("--prompts", type=int, default=300, help="Prompts that are answered under each setting.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="What is compared.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(list(argv))
    one_thread()
    with progress_bar() as progress:
        study = Study(args.work, args.prompts, tuple(kind for part in args.parts for kind in PARTS[part]), progress)
        study.train()
        found = study.decode()
    find(found).write(args.out / "heads", Console())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
