"""Rollouts, and the prefix scorer that learns from them."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.trainer.reward_config import RewardConfig

from steersman.guidance.reward_loading import load_reward_model
from steersman.training import command
from steersman.training.accuracy import score_ends
from steersman.training.checkpoints import read_facts
from steersman.training.configuration import load
from steersman.training.data.preferences import DataError
from steersman.training.rewards.arguments import RewardArguments
from steersman.training.rewards.prefix_value import PREFIX_VALUE
from steersman.training.rewards.rollouts import load_rollouts, make_rollouts
from tests.support.training import write_config, write_task

CACHE = 2**21
WINDOW = 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task; `teacher`, a random reward model; `policy`, which ends its answers by any of 50 tokens; and
    `rollouts.jsonl`, kind answers with reward 2 and rude ones with −1."""
    folder = write_task(tmp_path_factory.mktemp("values"))
    policy, tokenizer = load(str(folder / "model"), AutoModelForCausalLM)
    policy.generation_config.eos_token_id = list(range(1, 500, 10))
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    model, tokenizer = load(str(folder / "model"), AutoModelForSequenceClassification, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    rows = [
        {"prompt": pair["prompt"], "response": pair[name], "reward": reward}
        for pair in pairs
        for name, reward in (("chosen", 2.0), ("rejected", -1.0))
    ]
    (folder / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_every_token_of_the_response_learns_the_final_reward(folder: Path, tmp_path: Path, rng: random.Random) -> None:
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()[:5]]
    for row in rows:
        row["reward"] = rng.gauss(0, 2)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    arguments = RewardArguments(str(folder / "model"), str(path), objective="prefix_value")
    config = RewardConfig(str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none")
    model, tokenizer = PREFIX_VALUE.load(arguments)
    torch.nn.init.normal_(model.score.weight)
    rollouts = PREFIX_VALUE.read(arguments, config, tokenizer)
    trainer = PREFIX_VALUE.make_trainer(arguments, config, model, tokenizer, rollouts)
    loss = trainer.compute_loss(model, next(iter(trainer.get_train_dataloader())))
    errors = [
        (score - row["reward"]) ** 2
        for row, rollout in zip(rows, rollouts, strict=True)
        for score in score_ends(
            model, [rollout.prompt + rollout.response[:n] for n in range(1, len(rollout.response) + 1)]
        ).tolist()
    ]
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_a_scorer_of_given_rollouts_is_served_token_by_token(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "value")
    keys = {"objective": "prefix_value", "train_file": str(folder / "rollouts.jsonl"), "output_dir": out}
    assert command.main(["reward", "--config", str(write_config(folder, **keys, num_train_epochs=4))]) == 0
    facts = read_facts(out)
    assert (facts["kind"], facts["rollouts"]) == ("reward", 128)
    assert facts["accuracy"]["1"] > 0.95
    tokenizer = AutoTokenizer.from_pretrained(out)
    served = load_reward_model("value", out, tokenizer, cache_bytes=CACHE)
    assert served.kind == "causal"
    rollout = load_rollouts(folder / "rollouts.jsonl", tokenizer, WINDOW)[0]
    assert served.score_text(rollout.prompt, rollout.response)[-1] == pytest.approx(2.0, abs=0.7)


def test_rollouts_of_a_policy_are_rewarded_and_go_on_where_they_stopped(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    prompts, path = tmp_path / "prompts.jsonl", tmp_path / "rollouts.jsonl"
    prompts.write_text("".join(lines[:10]))
    policy, tokenizer = load(str(folder / "policy"), AutoModelForCausalLM)
    teacher = load_reward_model("teacher", str(folder / "teacher"), tokenizer, cache_bytes=CACHE)

    def make() -> list[dict[str, Any]]:
        make_rollouts(path, prompts, policy, teacher, tokenizer, window=WINDOW, batch=4, seed=3)
        return [json.loads(line) for line in path.read_text().splitlines()]

    rows = make()
    assert [row["prompt"] for row in rows] == [json.loads(line)["prompt"] for line in lines[:10]]
    path.write_text(path.read_text()[: len(path.read_text()) // 2])
    assert make() == rows
    classifier = AutoModelForSequenceClassification.from_pretrained(folder / "teacher")
    read = load_rollouts(path, tokenizer, WINDOW)
    assert len(read) == sum(row["reward"] is not None for row in rows) > 3
    ends = score_ends(classifier, [row.prompt + row.response for row in read])
    assert [row.reward for row in read] == pytest.approx(ends.tolist(), abs=1e-3)
    prompts.write_text("".join(lines[1:10]))
    with pytest.raises(DataError, match="answers other prompts"):
        make()


def test_policy_and_teacher_are_given_in_the_configuration(folder: Path, tmp_path: Path) -> None:
    given = {"policy": str(folder / "policy"), "teacher": str(folder / "teacher"), "max_length": WINDOW}
    keys = {"objective": "prefix_value", "output_dir": str(tmp_path / "value"), "num_train_epochs": 1, **given}
    assert command.main(["reward", "--config", str(write_config(folder, **keys, per_device_eval_batch_size=32))]) == 0
    (made,) = (tmp_path / "value").glob("rollouts-*.jsonl")
    facts = read_facts(tmp_path / "value")
    finished = [line for line in made.read_text().splitlines() if json.loads(line)["reward"] is not None]
    assert facts["rollouts"] == len(finished)
    assert (facts["policy"], facts["teacher"]) == ("policy", "teacher")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "a", "response": "b"}, "rows.jsonl:1: field 'reward' is missing"),
        ({"prompt": "a", "response": "b", "reward": "high"}, "rows.jsonl:1: 'reward' is 'high', not a finite number"),
        ({"prompt": "a", "response": " ", "reward": 1}, "rows.jsonl:1: 'response' is empty"),
        ({"prompt": "a", "response": [{"role": "assistant", "content": "b"}], "reward": 1}, "both text or both lists"),
        ({"prompt": "a", "response": "b" * 200, "reward": 1}, "rows.jsonl:1: prompt and 'response' have"),
        ({"prompt": "a", "response": "b", "reward": None}, "rows.jsonl: no answer finished"),
    ],
)
def test_a_bad_row_is_named(
    folder: Path, tmp_path: Path, row: dict[str, Any], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    keys = {"objective": "prefix_value", "train_file": str(tmp_path / "rows.jsonl"), "max_length": WINDOW}
    assert command.main(["reward", "--config", str(write_config(folder, **keys))]) == 2
    assert complaint in capsys.readouterr().err.strip().splitlines()[-1]


def test_policy_without_teacher_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"objective": "prefix_value", "policy": str(folder / "policy")}
    assert command.main(["reward", "--config", str(write_config(folder, **keys))]) == 2
    assert "give both, or neither" in capsys.readouterr().err
