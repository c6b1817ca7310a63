"""`steersman train reward` from end to end, on a model of a few thousand weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedModel,
)
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from steersman.guidance.reward_loading import load_reward_model
from steersman.training import command
from steersman.training.accuracy import accuracy_by_share, score_ends, score_last_tokens
from steersman.training.checkpoints import read_facts
from steersman.training.configuration import parse, prepare_tokenizer
from steersman.training.data.preferences import TokenizedPreference, load_preferences
from steersman.training.prefixes import ALL_PREFIXES, cut, truncate
from steersman.training.rewards.arguments import RewardArguments
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


def copy_model(folder: Path, to: Path, **special: str | None) -> Path:
    """The model to train, its tokenizer with other special tokens and its configuration without any."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.config.pad_token_id = None
    model.save_pretrained(to)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for name, token in special.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(to)
    return to


def score_alone(model: Any, ids: list[int]) -> float:
    """The score at the last of some ids, from a forward of them alone."""
    hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    return model.score(hidden)[0].item()


@pytest.mark.parametrize(
    ("keys", "pad"),
    [
        ({"objective": "full"}, "the end token"),
        ({"objective": "full"}, None),
        ({"prefixes": "causal"}, "the end token"),
        ({"objective": "vocabulary"}, None),
    ],
    ids=str,
)
def test_padding_may_be_the_end_token_which_is_trained_and_scored(
    folder: Path, tmp_path: Path, keys: dict[str, Any], pad: str | None
) -> None:
    end = AutoTokenizer.from_pretrained(folder / "model").eos_token
    start, out = copy_model(folder, tmp_path / "start", pad_token=pad and end), tmp_path / "out"
    assert AutoTokenizer.from_pretrained(start).pad_token == (pad and end)
    config = write_config(folder, model=str(start), output_dir=str(out), num_train_epochs=1, **keys)
    assert command.main(["reward", "--config", str(config)]) == 0
    with_own = write_config(folder, output_dir=str(tmp_path / "own"), num_train_epochs=1, **keys)
    assert command.main(["reward", "--config", str(with_own)]) == 0
    facts = [read_facts(place) for place in (out, tmp_path / "own")]
    assert facts[0]["accuracy"] == facts[1]["accuracy"]
    trained, expected = (load_file(place / "model.safetensors") for place in (out, tmp_path / "own"))
    for name, weight in expected.items():
        torch.testing.assert_close(trained[name], weight, atol=1e-4, rtol=1e-4)
    if keys.get("objective") == "vocabulary":
        return
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.pad_token == tokenizer.eos_token == end
    model = AutoModelForSequenceClassification.from_pretrained(out, dtype="float32")
    row = load_preferences(folder / "pairs.jsonl", tokenizer, 128)[0]
    assert row.chosen[-1] == tokenizer.eos_token_id
    texts = [row.prompt + row.chosen, row.prompt + row.rejected, row.prompt + row.chosen[:1]]
    alone = [score_alone(model, ids) for ids in texts]
    assert score_ends(model, texts).tolist() == pytest.approx(alone, abs=1e-5)
    served = load_reward_model("served", str(out), tokenizer)
    assert served.score_answers(row.prompt, [row.chosen, row.rejected])[0] == pytest.approx(alone[:2], abs=1e-4)


def test_special_tokens_and_a_template_are_those_of_the_configuration(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    pad, end = tokenizer.convert_ids_to_tokens([7, 9])
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    given = {"pad_token": pad, "eos_token": end, "chat_template_path": str(tmp_path / "chat.jinja")}
    out = tmp_path / "out"
    config = write_config(folder, objective="full", output_dir=str(out), num_train_epochs=1, **given)
    assert command.main(["reward", "--config", str(config)]) == 0
    saved = AutoTokenizer.from_pretrained(out)
    assert (saved.pad_token, saved.eos_token, saved.chat_template) == (pad, end, "{{ messages[0].content }}")
    assert AutoModelForSequenceClassification.from_pretrained(out).config.pad_token_id == 7
    arguments, settings = parse("reward", RewardArguments, RewardConfig, ["--config", str(config)])
    prepared = prepare_tokenizer(arguments.model, settings)
    assert load_preferences(folder / "pairs.jsonl", prepared, 128)[0].chosen[-1] == 9


def test_an_encoder_that_would_take_its_end_for_padding_is_refused_before_it_is_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    BertConfig(vocab_size=500).save_pretrained(tmp_path)  # and no weights
    config = write_config(folder, model=str(tmp_path), objective="full")
    assert command.main(["reward", "--config", str(config)]) == 2
    assert "name another token of its vocabulary (--pad_token TOKEN)" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("keys", [{"objective": "full"}, {"prefixes": "causal"}], ids=str)
def test_batches_are_padded_and_grouped_as_the_configuration_has_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    lengths = []
    step = RewardTrainer.training_step

    def look(self: Any, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        lengths.append(inputs["attention_mask"].sum(dim=1).tolist())
        assert inputs["input_ids"].shape[1] % 24 == 0
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(RewardTrainer, "training_step", look)
    given = {"pad_to_multiple_of": 24, "train_sampling_strategy": "group_by_length", "num_train_epochs": 1}
    config = write_config(folder, output_dir=str(tmp_path), per_device_train_batch_size=4, **given, **keys)
    assert command.main(["reward", "--config", str(config)]) == 0
    longest = [max(batch) for batch in lengths]
    for start in range(0, len(longest), 4):  # transformers sorts four batches at a time, where there are 16
        assert longest[start : start + 4] == sorted(longest[start : start + 4], reverse=True)


REFUSED = {
    "eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True, "save_strategy": "best",
    "push_to_hub": True, "hub_model_id": "me/model", "label_smoothing_factor": 0.1, "label_names": ["x"],
    "dataset_num_proc": 2, "model_init_kwargs": {"dtype": "bfloat16"}, "trust_remote_code": True,
    "length_column_name": "size", "do_predict": True, "metric_for_best_model": "loss",
}  # fmt: skip
OF_OBJECTIVES: list[dict[str, Any]] = [
    {"center_rewards_coefficient": 0.01, "objective": "regression"},
    {"center_rewards_coefficient": 0.01, "objective": "aspects"},
    {"keep": 0.3, "objective": "full"},
    {"subset_ratio": 2.0, "prefixes": "causal"},
    {"prefixes_per_pair": 3, "prefixes": "subset"},
    {"teacher": "model", "objective": "partial"},
    {"top_k": 5, "objective": "vocabulary"},
    {"weights": {"safety": 1.0}, "objective": "full"},
    {"pad_token": "<none such>"},
    {"eos_token": "<none such>"},
    {"chat_template_path": "a-folder"},
]


@pytest.mark.parametrize("keys", [*({key: value} for key, value in REFUSED.items()), *OF_OBJECTIVES], ids=str)
def test_what_would_be_ignored_is_refused_by_name_before_a_model_is_loaded(
    folder: Path, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    assert command.main(["reward", "--config", str(write_config(folder, **keys))]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"steersman train reward: error: {next(iter(keys))}: ")
