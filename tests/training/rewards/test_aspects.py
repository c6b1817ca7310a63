"""The aspects reward model: what it is trained on, its loss, and a checkpoint that guides."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.trainer.reward_config import RewardConfig

from steersman.guidance.reward_loading import load_reward_model
from steersman.training import command
from steersman.training.checkpoints import read_facts
from steersman.training.data.preferences import TokenizedPreference, load_preferences
from steersman.training.data.segments import SegmentedResponse
from steersman.training.rewards.arguments import RewardArguments
from steersman.training.rewards.aspects import ASPECTS, score_segments
from tests.support.policies import draw_rows
from tests.support.training import write_config, write_task

WEIGHTS = {"helpfulness": 0.5, "safety": 0.3, "clarity": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("aspects"))


@pytest.mark.parametrize("where", ["segments", "tokens"])
def test_the_loss_is_the_mean_squared_error_where_scores_are_learned(
    folder: Path, tmp_path: Path, rng: random.Random, where: Any
) -> None:
    rows = draw_rows(rng, 6, aspects=3)
    arguments = RewardArguments(
        model=str(folder / "model"), train_file="", objective="aspects", weights=WEIGHTS, aspects_at=where
    )
    model, tokenizer = ASPECTS.load(arguments)
    torch.nn.init.normal_(model.score.weight)
    config = RewardConfig(
        str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        per_device_train_batch_size=6,
    )  # fmt: skip
    trainer = ASPECTS.make_trainer(arguments, config, model, tokenizer, rows)
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(model, dict(batch))

    slow = AutoModelForSequenceClassification.from_config(model.config, dtype=torch.float64).eval()
    slow.load_state_dict(model.state_dict())
    errors = []
    for prompt, response, segments in sides(rows):
        starts = [0, *segments.ends[:-1]]
        for start, end, scores in zip(starts, segments.ends, segments.scores, strict=True):
            for length in range(start + 1, end + 1) if where == "tokens" else [end]:
                with torch.no_grad():
                    ids = torch.tensor([prompt + response[:length]])
                    outputs = slow(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
                errors += [(float(output) - score) ** 2 for output, score in zip(outputs, scores, strict=True)]
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_training_from_yaml_learns_saves_what_it_measured_and_guides(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "aspects"
    keys = {"objective": "aspects", "weights": WEIGHTS, "num_train_epochs": 15}
    assert command.main(["reward", "--config", str(write_config(folder, **keys)), "--output_dir", str(out)]) == 0
    facts = read_facts(out)
    assert facts["kind"] == "aspects"
    assert dict(zip(facts["aspects"], facts["weights"], strict=True)) == WEIGHTS
    model = AutoModelForSequenceClassification.from_pretrained(out, dtype="float32").eval()
    assert list(model.config.id2label.values()) == list(WEIGHTS)
    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = load_preferences(folder / "pairs.jsonl", tokenizer, 128, aspects=list(WEIGHTS))
    known = sides(rows)
    scores = score_segments(model, [(prompt, response, segments.ends) for prompt, response, segments in known])
    ratings = [torch.tensor(segments.scores) for *_, segments in known]
    assert [own.shape for own in scores] == [own.shape for own in ratings]
    squared = (torch.cat(scores) - torch.cat(ratings)).square()
    assert facts["aspect_error"] == pytest.approx(
        dict(zip(WEIGHTS, squared.mean(dim=0).sqrt().tolist(), strict=True)), abs=1e-3
    )
    assert all(facts["aspect_error"][aspect] < 0.5 * facts["aspect_deviation"][aspect] for aspect in WEIGHTS)

    served = load_reward_model("aspects", str(out), tokenizer)
    weighted = [float(own[-1] @ torch.tensor(list(WEIGHTS.values()))) for own in scores[:2]]
    prompt, response, _ = known[0]
    assert served.score_answers(prompt, [response])[0] == pytest.approx(weighted[:1], abs=1e-4)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| helpfulness | 0.5 |" in card
    assert "steersman serve MODEL --reward-model aspects=" in card


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"weights": {"wit": 1}}, "pairs.jsonl:1: 'chosen_segments' has no scores for 'wit'"),
        ({"weights": "much"}, "weights is a mapping of aspects to numbers"),
        ({"label_smoothing": 0.1}, "learn from labels, aspects does not"),
    ],
)
def test_errors_are_one_line(
    folder: Path, keys: dict[str, Any], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["reward", "--config", str(write_config(folder, objective="aspects", **keys))]) == 2
    assert complaint in capsys.readouterr().err.strip().splitlines()[-1]


def sides(rows: list[TokenizedPreference]) -> list[tuple[list[int], list[int], SegmentedResponse]]:
    found = [
        (r.prompt, ids, own)
        for r in rows
        for ids, own in ((r.chosen, r.chosen_segments), (r.rejected, r.rejected_segments))
    ]
    return [(prompt, ids, own) for prompt, ids, own in found if own is not None]
