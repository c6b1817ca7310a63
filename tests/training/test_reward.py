"""`steersman train reward` from end to end, on a model of a few thousand weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.trainer.reward_config import RewardConfig

from steersman.training import command
from steersman.training.accuracy import accuracy_by_share, score
from steersman.training.data import TokenizedPreference, load_preferences
from steersman.training.objectives import bradley_terry
from steersman.training.prefixes import cut
from steersman.training.reward import causal_rows
from steersman.training.reward_trainer import PrefixCollator, PrefixRewardTrainer
from tests.support.training import write_config, write_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("reward"))


@pytest.mark.parametrize(
    "keys",
    [
        {"objective": "full"},
        {"objective": "partial", "prefixes": "subset", "subset_ratio": 2.0},
        {"objective": "partial", "prefixes": "causal", "prefixes_per_pair": 3, "store": "bfloat16"},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_training_from_yaml_learns_and_saves_what_it_measured(
    folder: Path, tmp_path: Path, keys: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(folder, **keys)
    assert command.main(["reward", "--config", str(config), "--output_dir", str(tmp_path / "kind")]) == 0
    losses = [
        float(line.split("'loss': '")[1].split("'")[0])
        for line in capsys.readouterr().out.splitlines()
        if "'loss'" in line
    ]
    assert losses[-1] < 0.5 * losses[0]

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "kind", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "kind")
    facts = model.config.steersman
    assert (facts["kind"], facts["objective"], facts["pairs"]) == ("reward", keys["objective"], 64)
    rows = load_preferences(folder / "pairs.jsonl", tokenizer, 128)
    assert facts["accuracy"] == accuracy_by_share(model, rows)
    assert facts["accuracy"]["1"] > 0.95
    card = (tmp_path / "kind" / "README.md").read_text(encoding="utf-8")
    assert "steersman serve MODEL --reward-model kind=" in card
    if keys.get("store") == "bfloat16":
        assert all(torch.equal(weight, weight.bfloat16().float()) for weight in model.parameters())
        assert model.config.dtype == torch.float32


@pytest.mark.parametrize("per_pair", [1, 4, 1000])
def test_prefixes_of_one_causal_forward_have_the_loss_of_separate_forwards(
    folder: Path, tmp_path: Path, per_pair: int
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1, dtype="float32")
    torch.nn.init.normal_(model.score.weight)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = load_preferences(folder / "pairs.jsonl", tokenizer, 128)[:12]
    dataset = causal_rows(rows, per_pair, seed=3)
    config = RewardConfig(str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none")
    collator = PrefixCollator(tokenizer.pad_token_id)
    trainer = PrefixRewardTrainer(model, config, collator, dataset, processing_class=tokenizer)
    loss = trainer.compute_loss(model, collator(list(dataset)))

    cuts = [(row, i) for row, example in zip(rows, dataset, strict=True) for i in cuts_of(row, example)]
    chosen = score(model, [row.prompt + cut(row.chosen, i) for row, i in cuts])
    rejected = score(model, [row.prompt + cut(row.rejected, i) for row, i in cuts])
    torch.testing.assert_close(loss, bradley_terry(chosen, rejected))
    loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def cuts_of(row: TokenizedPreference, example: dict[str, Any]) -> list[int]:
    positions = zip(example["chosen_positions"], example["rejected_positions"], strict=True)
    return [max(pair) - len(row.prompt) + 1 for pair in positions]


@pytest.mark.parametrize(
    ("keys", "flags", "complaint"),
    [
        ({}, ["--train_file", "absent.jsonl"], "absent.jsonl: no such file"),
        ({}, ["--model", "./absent"], "./absent can't be loaded"),
        ({"learning_speed": 1}, [], "learning_speed"),
        ({"objective": "half"}, [], "objective is one of partial, full, not 'half'"),
        ({"store": "half"}, [], "store is one of float32, bfloat16, not 'half'"),
        ({"prefixes_per_pair": "many"}, [], "invalid int value: 'many'"),
        ({}, ["--objective", "half"], "invalid choice: 'half'"),
        ({"prefixes_per_pair": 0}, [], "prefixes_per_pair at least 1"),
        ({"max_length": 20}, [], "pairs.jsonl:1: prompt and 'chosen' have"),
    ],
)
def test_errors_are_one_line_and_exit_code_two(
    folder: Path, keys: dict[str, Any], flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["reward", "--config", str(write_config(folder, **keys)), *flags]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("steersman train reward: error: ")
    assert complaint in last


def test_no_config_file_and_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["reward", "--config", "absent.yaml"]) == 2
    assert "absent.yaml" in capsys.readouterr().err
    assert command.main(["sorcery"]) == 2
    assert "'sorcery' can't be trained" in capsys.readouterr().err


def test_a_tokenizer_without_a_padding_token_of_its_own_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1).save_pretrained(tmp_path)
    assert command.main(["reward", "--config", str(write_config(folder)), "--model", str(tmp_path)]) == 2
    assert "padding token of its own" in capsys.readouterr().err
