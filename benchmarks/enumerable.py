"""A world of short answers over three letters in which P(chosen | both prefixes) is computed, not estimated.

An answer is some letters and the end token. The base writes letter after letter; the gold reward is of whole answers
only, so what a prefix is worth lies in how the base may go on. P(y1 preferred | prefixes u, v) = E σ(gold difference),
over all answers that begin with u and v.
"""

import functools
import itertools
import json
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abc"
WORDS = ["<pad>", "<eos>", "<prompt>", *LETTERS]
PROMPT = (WORDS.index("<prompt>"),)
_FIRST = (0.5, 0.3, 0.2)
_NEXT = {"a": (0.5, 0.2, 0.3), "b": (0.3, 0.4, 0.3), "c": (0.2, 0.6, 0.2)}
_STOP = 0.3
"""The base's chance of ending after each letter from the second on."""

Prefix = tuple[int, ...]
"""Token ids of a beginning of an answer, without the prompt."""


@dataclass(frozen=True)
class World:
    """All answers of 2 to `longest` letters."""

    longest: int = 6

    @cached_property
    def answers(self) -> list[str]:
        """Every answer, as letters."""
        lengths = range(2, self.longest + 1)
        return ["".join(letters) for n in lengths for letters in itertools.product(LETTERS, repeat=n)]

    @cached_property
    def probability(self) -> np.ndarray:
        """[N] of each answer under the base."""
        return np.array([self._probability(answer) for answer in self.answers])

    @cached_property
    def gold(self) -> np.ndarray:
        """[N] gold reward: an answer should end in a and use all letters, be short, and not repeat c at once."""
        return np.array(
            [2.0 * (y[-1] == "a") + 1.0 * (len(set(y)) == 3) - 1.5 * ("cc" in y) - 0.2 * len(y) for y in self.answers]
        )

    @property
    def cuts(self) -> range:
        """Numbers of tokens at which answers are cut; at the last, all are whole."""
        return range(1, self.longest + 2)

    def prefixes(self, cut: int) -> list[Prefix]:
        """What the answers begin with: each once."""
        return list(dict.fromkeys(tokens(answer)[:cut] for answer in self.answers))

    def belonging(self, cut: int) -> np.ndarray:
        """[prefixes, N] probability of each answer together with its prefix."""
        row = {prefix: n for n, prefix in enumerate(self.prefixes(cut))}
        joint = np.zeros((len(row), len(self.answers)))
        joint[[row[tokens(answer)[:cut]] for answer in self.answers], np.arange(len(self.answers))] = self.probability
        return joint

    def weights(self, cut: int) -> np.ndarray:
        """[prefixes] probability of each prefix under the base."""
        return self.belonging(cut).sum(axis=1)

    def preferred(self, cut: int, other: int) -> np.ndarray:
        """[prefixes at `cut`, prefixes at `other`] the exact P(the first answer is preferred | both prefixes)."""
        return _preferred(self, cut, other)

    def best_rewards(self, cut: int) -> np.ndarray:
        """[prefixes] the rewards that come closest to P between prefixes of this cut."""
        return _best_rewards(self, cut)

    def unfinished(self, cut: int) -> np.ndarray:
        """[prefixes] whether the end token is still to come."""
        return np.array([prefix[-1] != WORDS.index("<eos>") for prefix in self.prefixes(cut)])

    def write_pairs(self, path: Path, count: int, seed: int) -> None:
        """Preference rows: two answers of the base, labelled with P(chosen) = σ(gold difference)."""
        rng = random.Random(seed)
        drawn = rng.choices(range(len(self.answers)), weights=self.probability.tolist(), k=2 * count)
        with path.open("w") as file:
            for one, two in zip(drawn[::2], drawn[1::2], strict=True):
                if rng.random() >= expit(self.gold[one] - self.gold[two]):
                    one, two = two, one
                texts = {"chosen": " ".join(self.answers[one]), "rejected": " ".join(self.answers[two])}
                file.write(json.dumps({"prompt": "<prompt>", **texts}) + "\n")

    def _probability(self, answer: str) -> float:
        value = _FIRST[LETTERS.index(answer[0])]
        for before, letter in itertools.pairwise(answer):
            value *= _NEXT[before][LETTERS.index(letter)]
        ends = _STOP if len(answer) < self.longest else 1.0
        return value * (1 - _STOP) ** (len(answer) - 2) * ends


@functools.cache
def _preferred(world: World, cut: int, other: int) -> np.ndarray:
    first, second = (world.belonging(c) / world.weights(c)[:, None] for c in (cut, other))
    return first @ expit(world.gold[:, None] - world.gold) @ second.T


@functools.cache
def _best_rewards(world: World, cut: int) -> np.ndarray:
    return fit_rewards(world.preferred(cut, cut), world.weights(cut))


def tokens(answer: str) -> Prefix:
    """An answer's token ids, end token included."""
    return (*(WORDS.index(letter) for letter in answer), WORDS.index("<eos>"))


def save_start(folder: Path, seed: int) -> None:
    """A random language model over the letters, to train reward models from, and its tokenizer."""
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def fit_rewards(preferred: np.ndarray, weights: np.ndarray, steps: int = 60) -> np.ndarray:
    """[n] the rewards that Bradley-Terry's likelihood is highest for, given P [n, n].

    P averages σ over answers, which is not quite σ of a difference: what remains is no fault of training.
    Newton's method on the convex loss, each pair weighing what the base gives it.
    """
    pairs = np.outer(weights, weights)
    rewards = np.zeros(len(weights))
    for _ in range(steps):
        confidence = expit(rewards[:, None] - rewards)
        gradient = (pairs * (confidence - preferred)).sum(axis=1)
        curvature = pairs * confidence * (1 - confidence)
        hessian = np.diag(curvature.sum(axis=1)) - curvature
        step: np.ndarray = np.linalg.lstsq(hessian, gradient, rcond=None)[0]  # a constant is free
        rewards = rewards - step
        if np.abs(step).max() < 1e-9:
            break
    return rewards
