"""`steersman train reward --objective head`: a reward head on the frozen base's own hidden states."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed

from steersman.guidance.head_files import REWARD, HeadCheckpoint
from steersman.guidance.heads import Head
from steersman.training.accuracy import accuracy_of
from steersman.training.configuration import log_data, prepare_tokenizer
from steersman.training.data.preferences import TokenizedPreference, load_preferences
from steersman.training.data.sources import DataError, read_rows
from steersman.training.heads.arguments import HeadRewardConfig, check_head_config
from steersman.training.heads.examples import Example, read_pair, read_response
from steersman.training.heads.features import Features, Reading, compute_features, feature_folder
from steersman.training.heads.frozen_base import READ_TOKENS, FrozenBase, check_tokens
from steersman.training.heads.network import build_network
from steersman.training.heads.reward_targets import (
    LOSSES,
    RewardLoss,
    Scale,
    Teacher,
    pair_examples,
    rated_examples,
    rating_scale,
)
from steersman.training.heads.saving import make_probe, measure_spread, write_head
from steersman.training.heads.trainer import HeadTrainer
from steersman.training.prefixes import SHARES, cut, draw_cuts, tokens_at, truncate
from steersman.training.rewards.arguments import RewardArguments
from steersman.training.rewards.rated import RATINGS
from steersman.training.rewards.recipe import window_of
from steersman.training.rewards.rollouts import load_rollouts
from steersman.training.running import train

_SEEN = {
    "pairs": "prefixes of responses",
    "ratings": "prefixes of responses and the ratings of the whole ones",
    "teacher": "the rewards that another model gives to the base's likeliest tokens behind prefixes of responses",
}


@dataclass(frozen=True)
class _Data:
    """Rows, and where each is read."""

    readings: list[Reading]
    pairs: list[TokenizedPreference]
    """Two readings each; none where answers stand alone."""
    cuts: list[list[int]]
    """Of each pair: those whose prefixes are trained on."""
    ratings: list[float]
    """Of each reading, with target ratings."""


def train_reward_head(arguments: RewardArguments, config: HeadRewardConfig) -> dict[str, Any]:
    """Trains, measures and saves a reward head; returns the facts that its file carries."""
    check_head_config(config)
    set_seed(config.seed)
    tokenizer = prepare_tokenizer(arguments.model, config)
    data = _read(arguments, config, tokenizer)
    held_out = _read_held_out(arguments, config, tokenizer)
    rows = len(data.pairs or data.readings)
    log_data(arguments, rows, len(held_out.pairs) if held_out else 0)
    base = FrozenBase(arguments.model, config.device)
    check_tokens(base, tokenizer)
    texts = [reading.ids for reading in data.readings]
    base.check_output_layer(texts[:: max(1, len(texts) // 3)][:3])
    with feature_folder(arguments.feature_cache, config.output_dir) as folder:

        def compute(part: _Data, what: str) -> Features:
            return compute_features(base, part.readings, folder, tokens=READ_TOKENS, what=what)

        features = compute(data, "train_file")
        measured = (held_out, compute(held_out, "validation_file")) if held_out else None
        head, trained = _fit(arguments, config, base, tokenizer, (data, features), measured)
        facts = _facts(arguments, config, data, rows) | trained
        if measured:
            facts |= {"accuracy": _accuracy(head, *measured), "validation_pairs": len(measured[0].pairs)}
        facts["spread"] = measure_spread(head, base, measured[1] if measured else features)
    checkpoint = HeadCheckpoint(head, REWARD, base.facts, make_probe(base, texts), facts)
    shown = f"{_SEEN[arguments.head_target]} ({rows} {'pairs' if data.pairs else 'answers'})"
    return write_head(Path(config.output_dir), checkpoint, facts, shown, figure=arguments.figure).facts


def _fit(
    arguments: RewardArguments,
    config: HeadRewardConfig,
    base: FrozenBase,
    tokenizer: PreTrainedTokenizerBase,
    data: tuple[_Data, Features],
    held_out: tuple[_Data, Features] | None,
) -> tuple[Head, dict[str, Any]]:
    examples, others, scale = _make_examples(arguments, config, base, tokenizer, data, held_out)
    network = build_network(arguments, base, data[1].moments(), value=True)
    loss = RewardLoss(arguments.head_target, arguments.label_smoothing)
    validation = (held_out[1], others) if held_out and others else None
    trainer = HeadTrainer(network, config, loss, (data[1], examples), validation)
    trained = train(trainer)
    return trained.fold(scale.scale, scale.shift), trainer.describe()


def _make_examples(
    arguments: RewardArguments,
    config: HeadRewardConfig,
    base: FrozenBase,
    tokenizer: PreTrainedTokenizerBase,
    data: tuple[_Data, Features],
    held_out: tuple[_Data, Features] | None,
) -> tuple[list[Example], list[Example], Scale]:
    """Rows to train on, rows to choose the epoch by, and the scale of targets."""
    sets = [data, held_out] if held_out else [data]
    if arguments.head_target == "pairs":
        made = [pair_examples(features, part.readings, part.pairs, part.cuts) for part, features in sets]
        scale = Scale()
    elif arguments.head_target == "ratings":
        scale = rating_scale(data[0].ratings)
        made = [
            rated_examples(features, part.readings, part.ratings, scale) if part.ratings else []
            for part, features in sets
        ]
    else:
        longest = max((reading.ids for reading in data[0].readings), key=len)
        teacher = Teacher(str(arguments.teacher), tokenizer, base, arguments.top_k, longest)
        batch = config.per_device_eval_batch_size
        first, scale = teacher.examples(data[1], data[0].readings, batch)
        made = [first, *(teacher.examples(f, part.readings, batch, scale)[0] for part, f in sets[1:])]
    return made[0], made[1] if held_out else [], scale


def _read(arguments: RewardArguments, config: HeadRewardConfig, tokenizer: PreTrainedTokenizerBase) -> _Data:
    source, window = arguments.train_file, window_of(config, tokenizer)
    rng = random.Random(config.seed)
    if arguments.head_target == "ratings" and _holds_answers(source):
        answers = load_rollouts(source, tokenizer, window)
        readings = []
        for answer in answers:
            response = cut(answer.response, kept_tokens(len(answer.response), arguments.kept))
            readings.append(
                read_response(answer.prompt, response, draw_cuts(len(response), arguments.prefixes_per_pair, rng))
            )
        return _Data(readings, [], [], [answer.reward for answer in answers])
    needed = RATINGS if arguments.head_target == "ratings" else ()
    rows = truncate(load_preferences(source, tokenizer, window, needed=needed), arguments.kept)
    cuts = [draw_cuts(row.longer, arguments.prefixes_per_pair, rng) for row in rows]
    return _of_pairs(rows, cuts, cuts)


def _read_held_out(
    arguments: RewardArguments, config: HeadRewardConfig, tokenizer: PreTrainedTokenizerBase
) -> _Data | None:
    """Whole pairs, read where the loss is taken and where accuracy is measured."""
    if not arguments.validation_file:
        return None
    rows = load_preferences(arguments.validation_file, tokenizer, window_of(config, tokenizer))
    rng = random.Random(config.seed)
    cuts = [draw_cuts(row.longer, arguments.prefixes_per_pair, rng) for row in rows]
    places = [
        sorted({*own, *(tokens_at(share, row.longer) for share in SHARES)}) for own, row in zip(cuts, rows, strict=True)
    ]
    return _of_pairs(rows, cuts, places)


def _of_pairs(rows: Sequence[TokenizedPreference], cuts: list[list[int]], places: Sequence[Sequence[int]]) -> _Data:
    readings = [reading for row, own in zip(rows, places, strict=True) for reading in read_pair(row, own)]
    ratings = [getattr(row, name) for row in rows for name in RATINGS]
    return _Data(readings, list(rows), cuts, [] if None in ratings else ratings)


def _holds_answers(source: str) -> bool:
    """Whether rows are answers with a reward each; else they are pairs."""
    first = next(iter(read_rows(source)), None)
    if first is None:
        raise DataError(f"{source}: no rows")
    return "response" in first.values


def kept_tokens(length: int, keep: float) -> int:
    """Tokens of a response that are kept, as `truncate` counts them."""
    return tokens_at(keep, length) if keep <= 1 else int(keep)


@torch.no_grad()
def _accuracy(head: Head, data: _Data, features: Features) -> dict[str, float]:
    def score(cuts: Sequence[int], side: int) -> Tensor:
        rows, tokens = [], []
        for n, (row, wanted) in enumerate(zip(data.pairs, cuts, strict=True)):
            reading = data.readings[2 * n + side]
            length = len(reading.ids) - len(row.prompt)
            place = len(row.prompt) + min(wanted, length) - 1
            rows.append(features.starts[2 * n + side] + bisect_left(reading.places, place))
            tokens.append(reading.ids[place])
        hidden = features.states[torch.tensor(rows)]
        return head.at(head.features(hidden), torch.tensor(tokens).unsqueeze(1))[:, 0]

    return accuracy_of(lambda cuts: (score(cuts, 0), score(cuts, 1)), data.pairs)


def _facts(arguments: RewardArguments, config: HeadRewardConfig, data: _Data, rows: int) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "objective": arguments.objective,
        "target": arguments.head_target,
        "loss": LOSSES[arguments.head_target],
        "model": Path(arguments.model).name,
        "pairs" if data.pairs else "answers": rows,
        "prefixes_per_pair": arguments.prefixes_per_pair,
        "keep": arguments.kept,
        "width": arguments.head_width,
        "dropout": arguments.head_dropout,
        "tokens": arguments.head_tokens,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "epochs": config.num_train_epochs,
        "batch": config.per_device_train_batch_size * config.gradient_accumulation_steps,
        "seed": config.seed,
    }
    if arguments.label_smoothing:
        facts["label_smoothing"] = arguments.label_smoothing
    if arguments.head_target == "teacher":
        facts |= {"teacher": Path(str(arguments.teacher)).name, "top_k": arguments.top_k}
    return facts
