"""Objectives that learn from ratings and strengths, and reward models of any architecture, whole or by LoRA."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaV2Config,
    PreTrainedTokenizerFast,
)
from trl.trainer.reward_config import RewardConfig

from steersman.guidance.checkpoints import find_head
from steersman.guidance.reward_loading import load_reward_model
from steersman.training import command
from steersman.training.accuracy import score_ends
from steersman.training.checkpoints import read_facts
from steersman.training.configuration import load
from steersman.training.data.preferences import load_preferences
from steersman.training.rewards.arguments import RewardArguments
from steersman.training.rewards.pairs import TRUNCATED
from steersman.training.rewards.rated import REGRESSION, SCALED
from tests.support.training import KIND, RUDE, write_config, write_task

CACHE = 2**21
CLS, SEP = 1, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task, rated: kind words 1 and rude ones −2; and `encoder`, a DeBERTa with its own tokenizer."""
    folder = write_task(tmp_path_factory.mktemp("rated"))
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    for n, row in enumerate(rows):
        row |= {"score_chosen": 1.0, "score_rejected": -2.0, "strength": 1 + n % 3}
    (folder / "rated.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_encoder(folder / "encoder", [row["prompt"] for row in rows] + list(KIND + RUDE))
    return folder


def save_encoder(folder: Path, texts: list[str]) -> None:
    """DeBERTa-v3's shape: [CLS] text [SEP], relative positions in shared buckets, pooled at the first token."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="[UNK]", show_progress=False)
    inner.train_from_iterator(texts, trainer)
    inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=128, type_vocab_size=0, relative_attention=True, position_buckets=16,
        norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
        max_relative_positions=-1, num_labels=1, pad_token_id=0, pooler_hidden_size=32,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(folder: Path, out: Path, **keys: Any) -> dict[str, Any]:
    config = write_config(folder, **{"output_dir": str(out), "train_file": str(folder / "rated.jsonl"), **keys})
    assert command.main(["reward", "--config", str(config)]) == 0
    return read_facts(out)


@pytest.mark.parametrize("recipe", [REGRESSION, SCALED], ids=["regression", "scaled"])
def test_the_loss_is_the_formula_over_each_rows_own_numbers(
    folder: Path, tmp_path: Path, recipe: Any, rng: random.Random
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [json.loads(line) for line in (folder / "rated.jsonl").read_text().splitlines()[:5]]
    for row in rows:
        row |= {"score_chosen": rng.gauss(0, 2), "score_rejected": rng.gauss(0, 2), "strength": rng.uniform(0.1, 3)}
    path.write_text("\n".join(map(json.dumps, rows)))
    arguments = RewardArguments(str(folder / "model"), str(path))
    config = RewardConfig(str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none")
    model, tokenizer = recipe.load(arguments)
    torch.nn.init.normal_(model.score.weight)
    read = recipe.read(arguments, config, tokenizer)
    trainer = recipe.make_trainer(arguments, config, model, tokenizer, read)
    loss = trainer.compute_loss(model, next(iter(trainer.get_train_dataloader())))

    chosen, rejected = (
        score_ends(model, [row.prompt + getattr(row, name) for row in read]).double() for name in ("chosen", "rejected")
    )
    terms = []
    for row, c, r in zip(rows, chosen.tolist(), rejected.tolist(), strict=True):
        if recipe is REGRESSION:
            terms.append(((c - row["score_chosen"]) ** 2 + (r - row["score_rejected"]) ** 2) / 2)
        else:
            terms.append(row["strength"] * torch.nn.functional.softplus(torch.tensor(r - c)).item())
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_a_model_of_ratings_gives_the_ratings(folder: Path, tmp_path: Path) -> None:
    facts = train(folder, tmp_path / "rating", objective="regression", num_train_epochs=8)
    assert (facts["kind"], facts["objective"], facts["pairs"]) == ("reward", "regression", 64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rating")
    served = load_reward_model("rating", str(tmp_path / "rating"), tokenizer, cache_bytes=CACHE)
    row = load_preferences(folder / "pairs.jsonl", tokenizer, 128)[7]
    ratings, _ = served.score_answers(row.prompt, [row.chosen, row.rejected])
    assert ratings == pytest.approx([1.0, -2.0], abs=0.6)


def test_a_row_without_its_number_is_named(folder: Path, capsys: Any) -> None:
    assert command.main(["reward", "--config", str(write_config(folder, objective="scaled"))]) == 2
    assert "pairs.jsonl:1: 'strength' is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "keys",
    [
        {"objective": "partial", "prefixes": "causal", "prefixes_per_pair": 4},
        {"objective": "vocabulary", "prefixes_per_pair": 6},
    ],
    ids=lambda keys: keys["objective"],
)
def test_an_adapter_is_merged_into_weights_that_are_served_as_they_are(
    folder: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    facts = train(folder, tmp_path / "small", lora_rank=2, num_train_epochs=5, learning_rate=3e-2, **keys)
    assert facts["lora_rank"] == 2
    assert facts["accuracy"]["1"] > 0.9
    assert not list((tmp_path / "small").glob("adapter*"))
    before = load_file(folder / "model" / "model.safetensors")
    after = load_file(tmp_path / "small" / "model.safetensors")
    changes = {name: after[name].float() - before[name] for name in before if name in after and before[name].ndim == 2}
    ranks = {name: int(torch.linalg.matrix_rank(change, rtol=0.05)) for name, change in changes.items()}
    adapted = [name for name in ranks if "_proj" in name]
    assert adapted
    assert all(ranks[name] <= 2 for name in adapted)
    assert sum(ranks[name] for name in adapted) > 0
    assert ranks["model.embed_tokens.weight"] == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    served = load_reward_model("small", str(tmp_path / "small"), tokenizer, cache_bytes=CACHE)
    row = load_preferences(folder / "pairs.jsonl", tokenizer, 128)[0]
    (kind, rude), _ = served.score_answers(row.prompt, [row.chosen, row.rejected])
    assert kind > rude


@pytest.mark.parametrize("objective", ["full", "vocabulary"])
def test_training_goes_on_from_a_reward_model_with_its_head(folder: Path, tmp_path: Path, objective: str) -> None:
    """At a learning rate of nothing, training leaves what was there."""
    family = AutoModelForCausalLM if objective == "vocabulary" else AutoModelForSequenceClassification
    start, _ = load(str(folder / "model"), family, num_labels=1)
    start.config.tie_word_embeddings, start.config.steersman = False, {"kind": objective}
    head = find_head(start)
    head.weight = torch.nn.Parameter(torch.randn_like(head.weight))
    start.save_pretrained(tmp_path / "start")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / "start")
    train(
        folder, tmp_path / "end", objective=objective, model=str(tmp_path / "start"), learning_rate=0.0,
        num_train_epochs=1, validation_file=None,
    )  # fmt: skip
    kept = dict(family.from_pretrained(tmp_path / "end").named_parameters())
    assert kept.keys() == dict(start.named_parameters()).keys()
    assert all(torch.equal(parameter, kept[name]) for name, parameter in start.named_parameters())


@pytest.mark.parametrize(
    ("keys", "least"),
    [
        ({"objective": "partial", "subset_ratio": 1.5, "num_train_epochs": 6}, 0.9),
        ({"objective": "full", "num_train_epochs": 1}, 0.0),
        ({"objective": "truncated", "keep": 4, "lora_rank": 2, "num_train_epochs": 1}, 0.0),
    ],
    ids=["partial", "full", "truncated"],
)
def test_an_encoder_with_its_own_tokenizer_is_trained_on_the_texts_that_the_server_scores(
    folder: Path, tmp_path: Path, keys: dict[str, Any], least: float
) -> None:
    facts = train(folder, tmp_path / "text", model=str(folder / "encoder"), **keys)
    assert facts["kind"] == "text"
    assert facts["accuracy"]["1"] >= least
    base, own = (AutoTokenizer.from_pretrained(place) for place in (folder / "model", tmp_path / "text"))
    served = load_reward_model("text", str(tmp_path / "text"), base, cache_bytes=CACHE)
    assert served.kind == "text"
    row = json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])
    prompt, *tokens = (base(row[name])["input_ids"] for name in ("prompt", "chosen", "rejected"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "text")
    read = load_preferences(folder / "pairs.jsonl", own, 128)[0]
    assert (read.prompt[0], read.prompt.count(SEP), read.chosen[-1]) == (CLS, 0, SEP)
    expected = score_ends(model, [read.prompt + read.chosen, read.prompt + read.rejected])
    assert served.score_answers(prompt, tokens)[0] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_cut_text_ends_as_a_whole_one_does(folder: Path, tmp_path: Path) -> None:
    arguments = RewardArguments(str(folder / "encoder"), "", objective="truncated", keep=2)
    config = RewardConfig(str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none")
    model, tokenizer = TRUNCATED.load(arguments)
    rows = load_preferences(folder / "pairs.jsonl", tokenizer, 128)
    trainer = TRUNCATED.make_trainer(arguments, config, model, tokenizer, rows)
    for row, example in zip(rows, trainer.train_dataset, strict=True):
        assert example["chosen_ids"] == [*row.prompt, *row.chosen[:2], SEP]


def test_prefixes_of_one_forward_need_a_causal_model(folder: Path, capsys: Any) -> None:
    keys = {"model": str(folder / "encoder"), "prefixes": "causal"}
    assert command.main(["reward", "--config", str(write_config(folder, **keys))]) == 2
    assert "prefixes: causal needs a causal model" in capsys.readouterr().err
