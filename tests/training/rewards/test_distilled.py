"""A vocabulary head taught by a reward model that reads candidates."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
)
from trl.trainer.reward_config import RewardConfig

from steersman.guidance.auxiliary import Prefix
from steersman.guidance.reward_loading import load_reward_model
from steersman.training import command
from steersman.training.accuracy import score_ends
from steersman.training.checkpoints import read_facts
from steersman.training.configuration import ConfigError
from steersman.training.data.preferences import load_preferences
from steersman.training.rewards.arguments import RewardArguments
from steersman.training.rewards.causal import NO_POSITION
from steersman.training.rewards.distilled import DISTILLED, LEVEL, branch_scores, check_branches
from tests.support.training import write_config, write_task

CACHE = 2**21

LLAMA = LlamaConfig(
    vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, num_labels=1,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=2, n_positions=64, pad_token_id=0, num_labels=1)


def teacher_of(config: Any) -> Any:
    model = AutoModelForSequenceClassification.from_config(config).eval()
    torch.nn.init.normal_(model.score.weight)
    return model


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["Llama", "GPT-2"])
def test_branches_of_one_forward_have_the_rewards_of_whole_prefixes(config: Any, rng: random.Random) -> None:
    teacher = teacher_of(config)
    rows = [[rng.randrange(2, 90) for _ in range(length)] for length in (9, 30, 17)]
    ids = torch.tensor([row + [0] * (30 - len(row)) for row in rows])
    positions = torch.tensor([[1, 5, 8], [2, 29, NO_POSITION], [16, NO_POSITION, NO_POSITION]])
    candidates = torch.randint(2, 90, (3, 3, 4))
    found = branch_scores(teacher, {"input_ids": ids, "attention_mask": (ids > 0).long()}, positions, candidates)
    for n, row in enumerate(rows):
        for p, position in enumerate(positions[n].tolist()):
            if position != NO_POSITION:
                whole = score_ends(teacher, [[*row[:position], candidate] for candidate in candidates[n, p].tolist()])
                torch.testing.assert_close(found[n, p], whole, atol=1e-4, rtol=1e-4)
    check_branches(teacher, rows[1], "teacher")


def test_a_teacher_that_would_be_asked_wrongly_is_refused() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    narrow = MistralConfig(
        vocab_size=90, num_key_value_heads=2, head_dim=16, sliding_window=4, pad_token_id=0, num_labels=1, **shape
    )
    with pytest.raises(ConfigError, match="scores branches otherwise than whole prefixes"):
        check_branches(teacher_of(narrow), list(range(2, 40)), "narrow")
    encoder = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=90, num_labels=1, **shape))
    with pytest.raises(ConfigError, match="no causal reward model"):
        check_branches(encoder, list(range(2, 40)), "encoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task with a teacher, trained on prefixes."""
    folder = write_task(tmp_path_factory.mktemp("distilled"))
    keys = {"objective": "partial", "prefixes": "causal", "prefixes_per_pair": 6, "validation_file": None}
    config = write_config(folder, output_dir=str(folder / "teacher"), **keys)
    assert command.main(["reward", "--config", str(config)]) == 0
    return folder


def test_the_loss_is_that_of_separate_forwards(folder: Path, tmp_path: Path) -> None:
    given = {"policy": str(folder / "model"), "teacher": str(folder / "teacher"), "top_k": 3, "prefixes_per_pair": 4}
    arguments = RewardArguments(str(folder / "model"), "", objective="distilled", **given)
    student, tokenizer = DISTILLED.load(arguments)
    torch.nn.init.normal_(student.lm_head.weight)
    rows = load_preferences(folder / "pairs.jsonl", tokenizer, 128)[:6]
    config = RewardConfig(str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none")
    trainer = DISTILLED.make_trainer(arguments, config, student, tokenizer, rows)
    examples = list(trainer.train_dataset)
    loss = trainer.compute_loss(student, trainer.data_collator(examples))

    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "teacher")
    policy = AutoModelForCausalLM.from_pretrained(folder / "model")
    within, levels, count = 0.0, 0.0, 0
    for example in examples:
        for side in ("chosen", "rejected"):
            for position in example[f"{side}_positions"]:
                prefix, token = example[f"{side}_ids"][:position], example[f"{side}_ids"][position]
                with torch.no_grad():
                    logits, rewards = (m(torch.tensor([prefix])).logits[0, -1].double() for m in (policy, student))
                candidates = [token, *logits.topk(3).indices.tolist()]
                taught = score_ends(teacher, [[*prefix, candidate] for candidate in candidates]).double()
                difference = rewards[candidates] - taught
                within += (difference - difference.mean()).square().mean().item()
                levels += difference.mean().square().item()
                count += 1
    assert loss.item() == pytest.approx((within + LEVEL * levels) / count, rel=1e-4)


def test_a_student_learns_what_its_teacher_says_and_is_served(folder: Path) -> None:
    given = {"teacher": str(folder / "teacher"), "policy": str(folder / "model"), "prefixes_per_pair": 6}
    config = write_config(folder, objective="distilled", num_train_epochs=6, **given)
    assert command.main(["reward", "--config", str(config)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder / "trained")
    served = load_reward_model("student", str(folder / "trained"), tokenizer, cache_bytes=CACHE)
    assert (served.kind, served.describe()["objective"]) == ("vocabulary", "distilled")
    facts = read_facts(folder / "trained")
    assert facts["accuracy"]["1"] > 0.95
    assert (facts["teacher"], facts["policy"], facts["top_k"]) == ("teacher", "model", 10)

    teacher = load_reward_model("teacher", str(folder / "teacher"), tokenizer, cache_bytes=CACHE)
    policy = AutoModelForCausalLM.from_pretrained(folder / "model")
    row = load_preferences(folder / "pairs.jsonl", tokenizer, 128)[0]
    unexplained, spread = 0.0, 0.0
    for response in (row.chosen, row.rejected):
        for n in range(1, len(response)):
            prefix = [Prefix(n, row.prompt, response[:n])]
            likeliest = policy(torch.tensor([prefix[0].tokens()])).logits[0, -1].topk(10).indices
            rewards, own = (model.score(prefix, likeliest[None], None)[0][0] for model in (teacher, served))
            unexplained += (rewards - own).var().item()
            spread += rewards.var().item()
    assert unexplained < 0.2 * spread


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"teacher": "TEACHER"}, "distilled needs teacher, a reward model, and policy"),
        ({"policy": "TEACHER", "teacher": "TEACHER", "top_k": 0}, "top_k is at least 1, not 0"),
        ({"policy": "TEACHER", "teacher": "TEACHER", "label_smoothing": 0.1}, "learn from labels, distilled does not"),
        ({"policy": "./absent", "teacher": "TEACHER"}, "./absent can't be loaded"),
        ({"policy": "OTHER", "teacher": "TEACHER"}, "has another tokenizer than the model to train"),
    ],
)
def test_errors_are_one_line(
    folder: Path, tmp_path: Path, models: Path, keys: dict[str, Any], complaint: str, capsys: Any
) -> None:
    places = {"TEACHER": str(folder / "teacher"), "OTHER": str(models / "base")}
    keys = {key: places.get(str(value), value) for key, value in keys.items()}
    config = write_config(folder, objective="distilled", output_dir=str(tmp_path), **keys)
    assert command.main(["reward", "--config", str(config)]) == 2
    assert complaint in capsys.readouterr().err.strip().splitlines()[-1]
