"""`steersman train dpo`: what TRL is fed, its loss against the formula, and training from end to end on tiny models."""

import math
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from trl.trainer.dpo_config import DPOConfig

from steersman.training import command
from steersman.training.checkpoints import read_facts
from steersman.training.data import TokenizedPreference, load_preferences
from steersman.training.dpo import truncated
from steersman.training.dpo_trainers import TokenizedDPOTrainer, TokenLevelDPOTrainer
from steersman.training.implicit_reward import implicit_accuracy
from tests.support.training import VOCABULARY, write_config, write_task

EOS = 1


@pytest.fixture
def seed() -> int:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    return seed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("dpo"), initializer_range=0.1)


def draw_rows(seed: int, count: int) -> list[TokenizedPreference]:
    rng = random.Random(seed)

    def ids(longest: int) -> list[int]:
        return [rng.randrange(2, VOCABULARY) for _ in range(rng.randint(1, longest))]

    return [TokenizedPreference(ids(12), [*ids(30), EOS], [*ids(30), EOS]) for _ in range(count)]


def new_trainer(
    folder: Path,
    tmp_path: Path,
    rows: list[TokenizedPreference],
    keep: float,
    kind: type[TokenizedDPOTrainer] = TokenizedDPOTrainer,
) -> TokenizedDPOTrainer:
    config = DPOConfig(
        str(tmp_path), beta=0.3, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        per_device_train_batch_size=len(rows), train_sampling_strategy="sequential",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return kind(model, args=config, train_dataset=truncated(rows, keep), processing_class=tokenizer)


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.4, 0.33, 0.25, 0.01])
def test_the_model_is_fed_each_response_s_own_first_part_and_no_other_end_token(
    folder: Path, tmp_path: Path, seed: int, keep: float
) -> None:
    rows = draw_rows(seed, 9)
    (batch,) = new_trainer(folder, tmp_path, rows, keep).get_train_dataloader()
    responses = [row.chosen for row in rows] + [row.rejected for row in rows]
    assert batch["input_ids"].shape[0] == len(responses) == 18
    for row, response, ids, attended, completion in zip(
        rows + rows, responses, batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    ):
        kept = math.ceil(Fraction(str(keep)) * len(response))
        assert ids[attended == 1].tolist() == row.prompt + response[:kept]
        assert ids[completion == 1].tolist() == response[:kept]
        assert attended.tolist() == sorted(attended.tolist(), reverse=True)
        assert (ids == EOS).sum() == (kept == len(response))


def step_away(trainer: TokenizedDPOTrainer, folder: Path, seed: int) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """Moves the trained weights at random; the policy and its reference in float64."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float64") for _ in range(2))
    policy.load_state_dict(trainer.model.state_dict())
    return policy, reference


def log_likelihood(model: LlamaForCausalLM, row: TokenizedPreference, response: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([row.prompt + response])).logits[0]
    assert logits.dtype == torch.float64
    places = range(len(row.prompt) - 1, len(row.prompt) + len(response) - 1)
    return sum(
        logits[place, token] - logits[place].exp().sum().log() for place, token in zip(places, response, strict=True)
    )


@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_the_loss_is_log_2_at_first_and_then_the_formula_s(
    folder: Path, tmp_path: Path, seed: int, keep: float
) -> None:
    """L = −mean log σ( β log π(y_w|x)/π_ref(y_w|x) − β log π(y_l|x)/π_ref(y_l|x) ), equation 7 of DPO."""
    rows = draw_rows(seed, 7)
    trainer = new_trainer(folder, tmp_path, rows, keep)
    (batch,) = trainer.get_train_dataloader()
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(math.log(2), abs=1e-5)

    policy, reference = step_away(trainer, folder, seed)
    loss = trainer.compute_loss(trainer.model, dict(batch)).item()
    terms = []
    for row in rows:
        chosen, rejected = (ids[: math.ceil(Fraction(str(keep)) * len(ids))] for ids in (row.chosen, row.rejected))
        rewards = [log_likelihood(policy, row, ids) - log_likelihood(reference, row, ids) for ids in (chosen, rejected)]
        terms.append(math.log1p(math.exp(-0.3 * (rewards[0] - rewards[1]).item())))
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    assert abs(loss - math.log(2)) > 1e-3


@pytest.mark.parametrize("version", [1, 2])
def test_the_token_level_loss_is_the_formula_s(folder: Path, tmp_path: Path, seed: int, version: Any) -> None:
    """Equations 13 and 14 of TDPO: the margin of DPO less the difference of the responses' sequential KL."""
    rows = draw_rows(seed, 5)
    trainer = new_trainer(folder, tmp_path, rows, 1.0, TokenLevelDPOTrainer)
    assert isinstance(trainer, TokenLevelDPOTrainer)
    trainer.version = version
    (batch,) = trainer.get_train_dataloader()
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(math.log(2), abs=1e-5)
    policy, reference = step_away(trainer, folder, seed)
    loss = trainer.compute_loss(trainer.model, dict(batch)).item()
    expected = 0.0
    for row in rows:
        (ratio_w, kl_w), (ratio_l, kl_l) = (
            ratio_and_kl(policy, reference, row, ids) for ids in (row.chosen, row.rejected)
        )
        delta = kl_l - kl_w if version == 1 else 0.5 * (kl_l - kl_w)
        expected += math.log1p(math.exp(-0.3 * (ratio_w - ratio_l - delta))) / len(rows)
    assert loss == pytest.approx(expected, rel=1e-4)


def ratio_and_kl(
    policy: LlamaForCausalLM, reference: LlamaForCausalLM, row: TokenizedPreference, response: list[int]
) -> tuple[float, float]:
    with torch.no_grad():
        both = [
            m(input_ids=torch.tensor([row.prompt + response])).logits[0].log_softmax(-1) for m in (policy, reference)
        ]
    ratio = kl = 0.0
    for place, token in enumerate(response, len(row.prompt) - 1):
        own, other = both[0][place], both[1][place]
        ratio += float(own[token] - other[token])
        kl += float((other.exp() * (other - own)).sum())
    return ratio, kl


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"keep": 0.5, "store": "bfloat16", "pairs": 48, "train_sampling_strategy": "group_by_length"},
        {"loss_type": "ipo", "beta": 0.5},
        {"method": "tdpo1"},
        {"method": "tdpo2", "alpha": 0.3, "lora_rank": 4, "learning_rate": 5e-2},
        {"lora_rank": 4, "store": "bfloat16", "learning_rate": 5e-2},
    ],
    ids=lambda keys: "-".join(map(str, keys)) or "whole",
)
def test_training_from_yaml_learns_and_saves_what_it_measured(
    folder: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    out = tmp_path / "kind"
    assert command.main(["dpo", "--config", str(write_config(folder, **keys)), "--output_dir", str(out)]) == 0
    facts = read_facts(out)
    assert (facts["kind"], facts["method"], facts["model"]) == ("policy", keys.get("method", "dpo"), "model")
    assert (facts["pairs"], facts["keep"], facts["beta"]) == (
        keys.get("pairs", 64), keys.get("keep", 1.0), keys.get("beta", 0.1)
    )  # fmt: skip
    assert facts["loss"] == keys.get("loss_type", keys.get("method", "sigmoid"))

    reference = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
    policy = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
    if "lora_rank" in keys:
        policy = PeftModel.from_pretrained(policy, str(out))
        assert not (out / "model.safetensors").exists()
        assert all("lora" in name for name in load_file(out / "adapter_model.safetensors"))
    else:
        policy = AutoModelForCausalLM.from_pretrained(out)
        assert policy.dtype == torch.float32
        assert policy.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = load_preferences(folder / "pairs.jsonl", tokenizer, 128)
    assert facts["accuracy"] == implicit_accuracy(policy, reference, rows, facts["beta"])
    assert facts["accuracy"]["1"] > 0.95
    (weights,) = out.glob("*.safetensors")
    stored = {tensor.dtype for tensor in load_file(weights).values()}
    assert stored == {torch.bfloat16 if "store" in keys else torch.float32}
    assert "steersman serve MODEL --policy kind=" in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("keys", "flags", "complaint"),
    [
        ({}, ["--train_file", "absent.jsonl"], "absent.jsonl: no such file"),
        ({}, ["--model", "./absent"], "./absent can't be loaded"),
        ({"learning_speed": 1}, [], "learning_speed"),
        ({"store": "half"}, [], "store is one of float32, bfloat16, not 'half'"),
        ({"keep": 0.0}, [], "keep is a share above 0 and at most 1, not 0"),
        ({}, ["--keep", "1.5"], "keep is a share above 0 and at most 1, not 1.5"),
        ({"keep": "half"}, [], "invalid float value: 'half'"),
        ({"lora_rank": -1}, [], "lora_rank is at least 0, not -1"),
        ({"pairs": 0}, [], "pairs is at least 1, not 0"),
        ({"max_length": 20}, [], "pairs.jsonl:1: prompt and 'chosen' have"),
        ({"loss_type": "guess"}, [], "Unknown loss type: guess"),
        ({"loss_type": "exo_pair"}, [], "Label smoothing must be greater than 0.0"),
    ],
)
def test_errors_are_one_line_and_exit_code_two(
    folder: Path, keys: dict[str, Any], flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["dpo", "--config", str(write_config(folder, **keys)), *flags]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("steersman train dpo: error: ")
    assert complaint in last
