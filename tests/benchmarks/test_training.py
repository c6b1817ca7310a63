"""The race of trainers: that they do the same work."""

from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from steersman.benchmarks.training import line_up, race
from steersman.training.data.preferences import load_preferences
from tests.support.training import write_task


def test_every_trainer_takes_the_same_steps_and_full_ends_where_trl_s_does(tmp_path: Path) -> None:
    folder = write_task(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1, dtype="float32")
    rows = load_preferences(folder / "pairs.jsonl", tokenizer, 128)
    contestants = line_up(model, tokenizer, rows, 8, str(tmp_path / "out"))
    tokens = race(contestants, 5, "race", Console(quiet=True))
    assert len(tokens) == 5
    assert all(len(each.seconds) == len(each.processor_seconds) == 5 for each in contestants.values())
    start = model.state_dict()
    trl, full, *partial = (each.trainer.model.state_dict() for each in contestants.values())
    for name in start:
        assert not torch.equal(full[name], start[name])
        torch.testing.assert_close(full[name], trl[name])
        assert all(not torch.equal(other[name], start[name]) for other in partial)
