"""The comparison of heads: its settings, what it writes from made-up answers, and what it keeps."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from rich.progress import Progress

from steersman.benchmarks import heads
from steersman.benchmarks.answers import Answer, Answers
from steersman.benchmarks.head_kinds import HEAD, MODEL, OTHERS, PARTS, POLICY, POLICY_HEAD, RIVALS, SEEDS, Kind
from steersman.benchmarks.head_tables import Best, Found, find
from steersman.benchmarks.heads import Decoder, Study, greedy
from steersman.benchmarks.settings import Prompt, Setting
from steersman.benchmarks.sweep import BASE
from steersman.demo import MODELS
from steersman.guidance.request import parse_guidance
from steersman.training.world.build import CONFIGS

KINDS = tuple(kind for part in PARTS.values() for kind in part)
PROMPTS = 12


def test_kinds_are_of_recipes_that_ship_and_settings_are_those_that_a_server_takes() -> None:
    names = [setting.name for kind in KINDS for setting in (*kind.curve.settings(MODEL), *kind.budgets.settings(MODEL))]
    assert len(set(names)) == len(names)
    assert len({kind.path(Path("work"), 0) for kind in KINDS}) == len(KINDS)
    for kind in KINDS:
        recipe = yaml.safe_load((CONFIGS / kind.config).read_text(encoding="utf-8"))
        assert ("head" in Path(kind.config).stem.split("-")) == kind.is_head
        assert recipe["model"] == ("small-language-model" if kind.from_small else "models/base")
        assert kind.shipped is None or any((MODELS / kind.shipped).glob("*.safetensors"))
        for setting in (*kind.curve.settings(MODEL), *(kind.budgets.settings(MODEL) if kind.is_reward else ())):
            parse_guidance(setting.guidance)


def test_what_is_compared_is_trained_on_equal_pairs_of_the_same_seeds() -> None:
    for head, rival in RIVALS:
        assert (head.is_head, rival.is_head) == (True, False)
        assert head.read == rival.read
        assert rival.seeds == head.seeds == SEEDS


def _answers(rng: random.Random, gold: float, kl: float = 1.0, reward: float | None = None) -> Answers:
    noise = [rng.gauss(0, 0.01) for _ in range(PROMPTS)]
    return [[Answer("text", 9, True, gold + e, None, kl, 0, 0, reward=reward)] for e in noise]


def _found(rng: random.Random, kinds: Sequence[Kind], golds: dict[str, float]) -> Found:
    """Gold of each kind at its best strength, which is its third; less at the others, as KL and own reward rise."""
    sweep = {BASE.name: [_answers(rng, 0.3, 0.0) for _ in SEEDS]}
    best = {kind.name: (Best(kind.curve.values[2], kind.curve.values[2]),) * len(kind.seeds) for kind in kinds}
    for kind in kinds:
        for n, name in enumerate((*kind.curve.names, *kind.budgets.names)):
            gold = golds[kind.name] - 0.1 * abs(n - 2)
            sweep[name] = [_answers(rng, gold, 1.0 + n, 0.5 + n if kind.is_reward else None) for _ in kind.seeds]
        sweep[kind.tuned] = sweep[kind.curve.names[2]]
        sweep[f"{kind.tuned}, greedy"] = [_answers(rng, golds[kind.name] + 0.5) for _ in kind.seeds]
    return Found(sweep, best, tuple(kinds))


def test_rows_and_verdicts_are_those_of_the_numbers_also_where_a_head_is_worse(rng: random.Random) -> None:
    golds = {kind.name: rng.uniform(0.5, 3.0) for kind in KINDS}
    worse = {head.name for head, _ in RIVALS if rng.random() < 0.5}
    for head, rival in RIVALS:
        golds[rival.name] = golds[head.name] + (1 if head.name in worse else -1) * rng.uniform(0.2, 0.5)
    finding = find(_found(rng, KINDS, golds))
    for (head, rival), sentence in zip(RIVALS, finding.sentences, strict=False):
        word, other = ("worse", "better") if head.name in worse else ("better", "worse")
        assert sentence.startswith(head.name[0].upper() + head.name[1:])
        assert rival.name in sentence
        assert sentence.count(word) == 2
        assert other not in sentence

    table, budgets, others, strengths = finding.tables
    shown = [kind for kind in KINDS if kind not in OTHERS]
    assert table["what guides"] == ["base", *(kind.name for kind in shown)]
    assert _numbers(table["gold, sampled"][1:]) == pytest.approx([golds[k.name] for k in shown], abs=0.03)
    assert _numbers(table["gold, greedy"][1:]) == pytest.approx([golds[k.name] + 0.5 for k in shown], abs=0.03)
    assert table["seeds"][1:] == [str(len(kind.seeds)) for kind in shown]
    assert others["what guides"][1:] == [kind.name for kind in OTHERS]
    assert {f"{kind.name}, β = 8, kl_budget = 2" for kind in KINDS if kind is HEAD} <= set(next(iter(budgets.values())))
    assert len(next(iter(strengths.values()))) == sum(len(kind.curve.values) for kind in shown)


def test_a_part_alone_is_written_with_its_picture(rng: random.Random, tmp_path: Path) -> None:
    found = _found(rng, (POLICY_HEAD, POLICY), {POLICY_HEAD.name: 2.0, POLICY.name: 2.0})
    find(found).write(tmp_path / "heads", Console(quiet=True))
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".md", ".png"}
    text = (tmp_path / "heads.md").read_text(encoding="utf-8")
    assert "At the same KL, DPO head lies" in text


class _Curved:
    """Stands for the base with a model: gold is best at the given strength for sampling, at another for greedy."""

    def __init__(self, kind: Kind, best: Best) -> None:
        self.asked: list[tuple[str, int]] = []
        self._kind, self._best = kind, best

    def answer(self, setting: Setting, prompts: Sequence[Prompt], seed: int) -> Answers:
        self.asked.append((setting.name, len(prompts)))
        guidance = setting.guidance or {}
        strength = guidance["beta" if self._kind.is_reward else "mix"]
        peak = self._best.greedy if setting.fields else self._best.sampled
        return [[Answer("text", 9, True, -abs(strength - peak), None, 1.0, 0, 0)] for _ in prompts]


class _Plain(_Curved):
    """Stands for the base alone."""

    def answer(self, setting: Setting, prompts: Sequence[Prompt], seed: int) -> Answers:
        return [[Answer("text", 9, True, -9.0, None, 0.0, 0, 0)] for _ in prompts]


def test_strengths_are_tuned_on_other_prompts_and_nothing_is_decoded_twice(rng: random.Random, tmp_path: Path) -> None:
    kind = replace(rng.choice(KINDS), seeds=(0,))
    best = Best(*(rng.choice(kind.curve.values) for _ in range(2)))
    guided = _Curved(kind, best)
    study = Study(tmp_path, PROMPTS, (kind,), Progress(console=Console(quiet=True)))
    decoder = Decoder(study, kind, 0, load=lambda *_: guided)  # type: ignore[arg-type, return-value]
    assert decoder.tune() == best
    settings = kind.curve.settings(MODEL)
    assert guided.asked == [(s.name, 100) for setting in settings for s in (setting, greedy(setting))]

    reported = decoder.answer("reporting", settings[0])
    assert guided.asked[-1] == (settings[0].name, PROMPTS)
    again = Decoder(study, kind, 0, load=lambda *_: pytest.fail("a model is loaded again"))
    assert (again.tune(), again.answer("reporting", settings[0])) == (best, reported)


def test_each_seeds_model_is_decoded_at_its_own_best_strengths(
    rng: random.Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = rng.choice([kind for kind in KINDS if kind not in OTHERS and kind.seeds == SEEDS])
    best = {seed: Best(*(rng.choice(kind.curve.values) for _ in range(2))) for seed in SEEDS}
    models = {kind.path(tmp_path, seed): _Curved(kind, best[seed]) for seed in SEEDS}

    def load(rewards: dict[str, Path], policies: dict[str, Path]) -> _Curved:
        return models[(rewards | policies)[MODEL]] if rewards | policies else _Plain(kind, best[0])

    monkeypatch.setattr(heads, "Decoder", partial(Decoder, load=load))
    found = Study(tmp_path, PROMPTS, (kind,), Progress(console=Console(quiet=True))).decode()
    assert found.best == {kind.name: tuple(best.values())}
    for name in (kind.tuned, f"{kind.tuned}, greedy"):
        assert [answers[0][0].gold for answers in found.sweep[name]] == [0.0] * 3, "nothing is better"
    assert set(kind.curve.names) <= found.sweep.keys()
    assert all(len(answers) == 3 for answers in found.sweep.values())


def _numbers(cells: Sequence[str]) -> list[float]:
    return [float(cell.split(" ")[0]) for cell in cells]
