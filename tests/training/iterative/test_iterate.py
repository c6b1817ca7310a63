"""`steersman train iterate` on the demo world's base, with a random aspects reward model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from steersman.demo import MODELS
from steersman.training import command
from steersman.training.checkpoints import read_facts
from steersman.training.data.preferences import load_preferences
from steersman.training.rewards.aspects import score_segments
from steersman.training.world.grammar import draw_prompts
from tests.support.training import write_config

WEIGHTS = {"wit": 0.6, "care": 0.4}
REPRESENTATIVES = {"wit": "mean", "care": "minimum"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`reward`, scores of which vary from 0 to 4, and `prompts.jsonl`."""
    folder = tmp_path_factory.mktemp("iterate")
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=1024, pad_token_id=0, eos_token_id=1, bos_token_id=None, num_labels=2,
        steersman={"kind": "aspects", "aspects": list(WEIGHTS), "weights": list(WEIGHTS.values())},
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    model.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")
    rows = [json.dumps({"prompt": prompt.text}) for prompt in draw_prompts("reward", 5)]
    (folder / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def iterate(folder: Path, out: Path, *flags: str, **keys: Any) -> int:
    removed = {"train_file", "validation_file"}
    own = {
        "model": str(MODELS / "base"), "reward_model": str(folder / "reward"), "prompts": str(folder / "prompts.jsonl"),
        "output_dir": str(out), "samples": 2, "max_new_tokens": 120, "num_train_epochs": 1, "learning_rate": 1e-4,
        "representatives": REPRESENTATIVES,
    }  # fmt: skip
    config = write_config(folder, **own | keys)
    lines = [line for line in config.read_text().splitlines() if line.split(":")[0] not in removed]
    config.write_text("\n".join(lines))
    return command.main(["iterate", "--config", str(config), *flags])


def test_rounds_pair_the_best_answer_with_the_worst_train_on_them_and_go_on_where_they_ended(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert iterate(folder, tmp_path, rounds=1, prompts_per_round=3) == 0
    first = tmp_path / "round-1"
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    assert iterate(folder, tmp_path, rounds=2, prompts_per_round=3) == 0
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()} == before
    assert capsys.readouterr().out.count("round 1: ") == 2

    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "reward")
    for number, of_round in ((1, prompts[:3]), (2, prompts[3:] + prompts[:1])):
        out = tmp_path / f"round-{number}"
        facts = read_facts(out / "policy")
        assert (facts["method"], facts["weights"], facts["round"]) == ("2d", WEIGHTS, number)
        assert facts["model"] == ("base" if number == 1 else "policy")
        rows = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
        assert facts["pairs"] == len(rows) > 0
        assert [row["prompt"] for row in rows] == [
            prompt for prompt in of_round if prompt in {r["prompt"] for r in rows}
        ]
        for row, read in zip(
            rows, load_preferences(out / "pairs.jsonl", tokenizer, 1024, aspects=list(WEIGHTS)), strict=True
        ):
            assert row["score_chosen"] > row["score_rejected"]
            assert row["score_rejected"] <= row["mean_reward"] <= row["score_chosen"]
            for ids, segments, reward in (
                (read.chosen, read.chosen_segments, row["score_chosen"]),
                (read.rejected, read.rejected_segments, row["score_rejected"]),
            ):
                assert segments is not None
                (own,) = score_segments(model, [(read.prompt, ids, segments.ends)])
                assert torch.tensor(segments.scores).allclose(own.clamp(0, 4), atol=1e-4)
                assert reward == pytest.approx(0.6 * own[:, 0].mean().item() + 0.4 * own[:, 1].min().item(), abs=1e-4)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"samples": 1}, "samples is at least 2, not 1"),
        ({"rounds": 0}, "rounds is at least 1, not 0"),
        ({"temperature": 0.0}, "temperature is above 0, not 0"),
        ({"reward_model": str(MODELS / "reward-partial")}, "is none of `train reward --objective aspects`"),
        ({"weights": {"charm": 1.0}}, "scores wit, care, not charm"),
        ({"representatives": {"wit": "mean"}}, "representatives: care is none of 2D-DPO's aspects"),
        ({"prompts": "absent.jsonl"}, "absent.jsonl: no such file"),
        ({"max_new_tokens": 1}, "no prompt has two answers of different reward that ended within max_new_tokens, 1"),
    ],
)
def test_errors_are_one_line(
    folder: Path, tmp_path: Path, keys: dict[str, Any], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert iterate(folder, tmp_path, **keys) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("steersman train iterate: error: ")
    assert complaint in last


def test_prompts_may_be_messages_with_what_belongs_to_them(folder: Path, tmp_path: Path) -> None:
    own = {"chat_template_kwargs": {"spelled": "out"}}
    rows = [{"prompt": [{"role": "user", "content": p.message}], **own} for p in draw_prompts("reward", 4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert iterate(folder, tmp_path / "out", prompts=str(tmp_path / "prompts.jsonl"), rounds=1) == 0
    pairs = [json.loads(line) for line in (tmp_path / "out/round-1/pairs.jsonl").read_text().splitlines()]
    assert pairs
    for pair in pairs:
        assert {"prompt": pair["prompt"], "chat_template_kwargs": pair["chat_template_kwargs"]} in rows
        (message,) = pair["chosen"]
        assert message["role"] == "assistant"
        assert message["content"] == "".join(segment["text"] for segment in pair["chosen_segments"])
