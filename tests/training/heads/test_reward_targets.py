"""What reward heads are trained towards, against float64 sums over whole forwards of the base."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from steersman.guidance.heads import HeadShape
from steersman.training.accuracy import score_ends, score_last_tokens
from steersman.training.data.preferences import TokenizedPreference
from steersman.training.heads.examples import Collator, Example, read_pair
from steersman.training.heads.features import Features, Reading, compute_features
from steersman.training.heads.frozen_base import FrozenBase
from steersman.training.heads.network import TrainedHead
from steersman.training.heads.reward_targets import (
    RewardLoss,
    Scale,
    Teacher,
    pair_examples,
    rated_examples,
    rating_scale,
)
from steersman.training.prefixes import draw_cuts
from tests.support import tiny
from tests.support.random_input import random_prompts


class Task:
    """Random pairs at random cuts, the base's features there, and a head with random weights."""

    def __init__(self, rng: random.Random, folder: Path, prefixes: int) -> None:
        self.path = tiny.save_base(folder / "base", rng.randrange(1000))
        self.base = FrozenBase(str(self.path), torch.device("cpu"))
        self.rows = [
            TokenizedPreference(prompt, *([rng.randrange(2, 300) for _ in range(rng.randint(1, 9))] for _ in range(2)))
            for prompt in random_prompts(rng, 4)
        ]
        self.cuts = [draw_cuts(row.longer, prefixes, rng) for row in self.rows]
        self.readings: list[Reading] = [
            each for row, cuts in zip(self.rows, self.cuts, strict=True) for each in read_pair(row, cuts)
        ]
        self.features: Features = compute_features(self.base, self.readings, folder, tokens=100, what="rows")
        self.head = TrainedHead(HeadShape(64, 8, 4, tiny.VOCABULARY), self.features.moments(), value=True)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.normal_(std=0.5)
        self.plain: Any = AutoModelForCausalLM.from_pretrained(self.path, dtype="float32").eval()

    def loss(self, loss: RewardLoss, examples: list[Example]) -> float:
        return loss(self.head, Collator(self.features)(examples)).item()

    @torch.no_grad()
    def score(self, prompt: list[int], response: list[int]) -> float:
        """The head's output for the last token, from a plain forward."""
        ids = torch.tensor([[*prompt, *response]])
        hidden = self.plain(ids, output_hidden_states=True).hidden_states[-1][0, -2:-1]
        return float(self.head.every(self.head.features(hidden))[0, response[-1]].double())


@pytest.mark.parametrize("prefixes", [0, 3])
def test_pairs_are_compared_at_equal_cuts(rng: random.Random, tmp_path: Path, prefixes: int) -> None:
    task, smoothing = Task(rng, tmp_path, prefixes), rng.choice([0.0, 0.2])
    terms = []
    for row, cuts in zip(task.rows, task.cuts, strict=True):
        assert len(cuts) == (row.longer if prefixes == 0 else min(prefixes, row.longer))
        for cut in cuts:
            margin = task.score(row.prompt, row.chosen[:cut]) - task.score(row.prompt, row.rejected[:cut])
            right = -math.log(1 / (1 + math.exp(-margin)))
            terms.append((1 - smoothing) * right + smoothing * (right + margin))
    examples = pair_examples(task.features, task.readings, task.rows, task.cuts)
    loss = RewardLoss("pairs", smoothing)
    assert task.loss(loss, examples) == pytest.approx(sum(terms) / len(terms), rel=1e-2)
    assert loss.count(Collator(task.features)(examples)) == len(terms)


def test_every_prefix_is_trained_towards_the_rating_of_the_whole_answer(rng: random.Random, tmp_path: Path) -> None:
    task = Task(rng, tmp_path, 3)
    ratings = [rng.gauss(5, 3) for _ in task.readings]
    scale = rating_scale(ratings)
    terms = []
    for n, (reading, rating) in enumerate(zip(task.readings, ratings, strict=True)):
        prompt = task.rows[n // 2].prompt
        target = (rating - scale.shift) / scale.scale
        scores = [task.score(prompt, reading.ids[len(prompt) : place + 1]) for place in reading.places]
        terms += [(score - target) ** 2 for score in scores]
    examples = rated_examples(task.features, task.readings, ratings, scale)
    assert task.loss(RewardLoss("ratings"), examples) == pytest.approx(sum(terms) / len(terms), rel=1e-2)
    assert abs(sum(float(example.targets[0]) for example in examples if example.targets is not None)) < 1e-3


@pytest.mark.parametrize("kind", ["causal", "vocabulary"])
def test_a_teacher_scores_the_base_s_likeliest_tokens_behind_every_prefix(
    rng: random.Random, tmp_path: Path, kind: str
) -> None:
    task = Task(rng, tmp_path, 3)
    save = tiny.save_reward if kind == "causal" else tiny.save_vocabulary_reward
    path = str(save(tmp_path / "teacher", rng.randrange(1000)))
    tokenizer = AutoTokenizer.from_pretrained(task.path)
    longest = max((reading.ids for reading in task.readings), key=len)
    teacher = Teacher(path, tokenizer, task.base, 4, longest)
    examples, scale = teacher.examples(task.features, task.readings, batch=3)
    model: Any = (AutoModelForSequenceClassification if kind == "causal" else AutoModelForCausalLM).from_pretrained(
        path
    )
    score = score_ends if kind == "causal" else score_last_tokens
    within = []
    for reading, example in zip(task.readings, examples, strict=True):
        assert example.targets is not None
        for n, place in enumerate(reading.places):
            own, *likeliest = example.tokens[n].tolist()
            assert own == reading.ids[place]
            with torch.no_grad():
                logits = task.plain(torch.tensor([reading.ids[:place]])).logits[0, -1]
            assert set(likeliest) == set(logits.topk(4).indices.tolist())
            taught = score(model.eval(), [[*reading.ids[:place], token] for token in example.tokens[n].tolist()])
            found = example.targets[n] * scale.scale + scale.shift
            torch.testing.assert_close(found, taught, atol=1e-3, rtol=1e-3)
            within.append((taught - taught.mean()).square().mean())
    assert scale.scale == pytest.approx(torch.stack(within).mean().sqrt().item(), rel=1e-2)
    again, same = teacher.examples(task.features, task.readings, 2, Scale(2.0, 1.0))
    assert same == Scale(2.0, 1.0)
    first, second = examples[0].targets, again[0].targets
    assert first is not None
    assert second is not None
    torch.testing.assert_close(second * 2 + 1, first * scale.scale + scale.shift, atol=1e-3, rtol=1e-3)
