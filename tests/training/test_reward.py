"""`steersman train reward` from end to end, on a model of a few thousand weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.trainer.reward_config import RewardConfig

from steersman.guidance.reward_loading import load_reward_model
from steersman.training import command
from steersman.training.accuracy import accuracy_by_share, score_ends, score_last_tokens
from steersman.training.data.preferences import TokenizedPreference, load_preferences
from steersman.training.prefixes import ALL_PREFIXES, cut, truncate
from steersman.training.rewards.causal import PrefixCollator, PrefixRewardTrainer, causal_rows
from steersman.training.rewards.losses import bradley_terry
from steersman.training.rewards.vocabulary import VocabularyRewardTrainer
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
        {"objective": "truncated", "keep": 0.5, "num_train_epochs": 6},
        {"objective": "full", "label_smoothing": 0.05},
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
    # With labels taken to be wrong no loss is below their entropy.
    wrong = torch.tensor(keys.get("label_smoothing", 0.0))
    assert losses[-1] - torch.special.entr(torch.stack((wrong, 1 - wrong))).sum() < 0.5 * losses[0]

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "kind", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "kind")
    facts = model.config.steersman
    assert (facts["kind"], facts["objective"], facts["pairs"]) == ("reward", keys["objective"], 64)
    rows = load_preferences(folder / "pairs.jsonl", tokenizer, 128)
    assert facts["accuracy"] == accuracy_by_share(model, rows)
    # Half of a response leaves some pairs equal.
    assert facts["accuracy"][f"{keys.get('keep', 1)}"] > (0.85 if "keep" in keys else 0.95)
    card = (tmp_path / "kind" / "README.md").read_text(encoding="utf-8")
    assert "steersman serve MODEL --reward-model kind=" in card
    if keys.get("store") == "bfloat16":
        assert all(torch.equal(weight, weight.bfloat16().float()) for weight in model.parameters())
        assert model.config.dtype == torch.float32


@pytest.mark.parametrize("per_pair", [1, 4, ALL_PREFIXES])
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
    chosen = score_ends(model, [row.prompt + cut(row.chosen, i) for row, i in cuts])
    rejected = score_ends(model, [row.prompt + cut(row.rejected, i) for row, i in cuts])
    torch.testing.assert_close(loss, bradley_terry(chosen, rejected))
    loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_a_vocabulary_head_is_trained_saved_and_served(folder: Path, tmp_path: Path, capsys: Any) -> None:
    keys = {"objective": "vocabulary", "prefixes_per_pair": 4, "num_train_epochs": 6}
    out = tmp_path / "every"
    assert command.main(["reward", "--config", str(write_config(folder, **keys)), "--output_dir", str(out)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    served = load_reward_model("every", str(out), tokenizer)
    assert (served.kind, served.describe()["objective"]) == ("vocabulary", "vocabulary")
    model = AutoModelForCausalLM.from_pretrained(out, dtype="float32")
    rows = load_preferences(folder / "pairs.jsonl", tokenizer, 128)
    facts = model.config.steersman
    assert facts["accuracy"] == accuracy_by_share(model, rows, score_last_tokens)
    assert facts["accuracy"]["1"] > 0.95
    row = rows[0]
    ends = served.score_answers(row.prompt, [row.chosen, row.rejected])[0]
    assert ends[0] > ends[1]
    texts = [row.prompt + row.chosen, row.prompt + row.rejected]
    assert ends == pytest.approx(score_last_tokens(model, texts).tolist(), abs=1e-4)


def test_prefixes_of_a_vocabulary_head_have_the_loss_of_separate_forwards(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32", num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = load_preferences(folder / "pairs.jsonl", tokenizer, 128)[:12]
    dataset = causal_rows(rows, 4, seed=3)
    config = RewardConfig(str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none")
    collator = PrefixCollator(tokenizer.pad_token_id)
    trainer = VocabularyRewardTrainer(model, config, collator, dataset, processing_class=tokenizer)
    loss = trainer.compute_loss(model, collator(list(dataset)))
    cuts = [(row, i) for row, example in zip(rows, dataset, strict=True) for i in cuts_of(row, example)]
    chosen = score_last_tokens(model, [row.prompt + cut(row.chosen, i) for row, i in cuts])
    rejected = score_last_tokens(model, [row.prompt + cut(row.rejected, i) for row, i in cuts])
    torch.testing.assert_close(loss, bradley_terry(chosen, rejected))


def test_beginnings_are_shares_of_each_response_or_numbers_of_tokens() -> None:
    row = TokenizedPreference([7, 8], list(range(9)), [3])
    assert truncate([row], 0.5) == [TokenizedPreference([7, 8], [0, 1, 2, 3, 4], [3])]
    assert truncate([row], 0.01) == [TokenizedPreference([7, 8], [0], [3])]
    assert truncate([row], 4) == [TokenizedPreference([7, 8], [0, 1, 2, 3], [3])]
    assert truncate([row], 1) == truncate([row], 99) == [row]


def cuts_of(row: TokenizedPreference, example: dict[str, Any]) -> list[int]:
    positions = zip(example["chosen_positions"], example["rejected_positions"], strict=True)
    return [max(pair) - len(row.prompt) + 1 for pair in positions]


@pytest.mark.parametrize(
    ("keys", "flags", "complaint"),
    [
        ({"keep": 0}, [], "keep is a share above 0"),
        ({"keep": 2.5}, [], "a whole number of tokens above 1, not 2.5"),
        ({"label_smoothing": 0.5}, [], "label_smoothing is from 0 to below 0.5"),
        ({}, ["--train_file", "absent.jsonl"], "absent.jsonl: no such file"),
        ({}, ["--model", "./absent"], "./absent can't be loaded"),
        ({"learning_speed": 1}, [], "learning_speed"),
        ({"objective": "half"}, [], "objective is one of partial, full, truncated, vocabulary, "),
        ({"store": "half"}, [], "store is one of float32, bfloat16, not 'half'"),
        ({"prefixes_per_pair": "many"}, [], "invalid int value: 'many'"),
        ({}, ["--objective", "half"], "invalid choice: 'half'"),
        ({"prefixes_per_pair": -1}, [], "prefixes_per_pair at least 0, which is all"),
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
