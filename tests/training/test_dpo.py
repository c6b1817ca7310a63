"""`steersman train dpo`: what TRL is fed, its loss against the formula, and training from end to end on tiny models."""

import json
import math
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl.trainer.dpo_config import DPOConfig

from steersman.training import command
from steersman.training.checkpoints import read_facts
from steersman.training.data import TokenizedPreference, load_preferences
from steersman.training.dpo import TokenizedDPOTrainer, truncated
from steersman.training.implicit_reward import implicit_accuracy
from steersman.training.world.grammar import draw_prompts
from steersman.training.world.tokenizer import train_tokenizer

KIND = (" You are kind .", " We thank you .", " You are very kind and we thank you .")
RUDE = (" You are rude .", " We blame you .", " You are very rude and we blame you .")
EOS, VOCABULARY = 1, 500


@pytest.fixture
def seed() -> int:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    return seed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` (a random causal language model with tokenizer) and `pairs.jsonl`, in which kind words win."""
    folder = tmp_path_factory.mktemp("dpo")
    prompts = [prompt.text for prompt in draw_prompts("base", 600)]
    tokenizer = train_tokenizer([*prompts, *KIND, *RUDE], vocabulary=VOCABULARY)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, pad_token_id=0, eos_token_id=EOS, bos_token_id=None, tie_word_embeddings=True,
        initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"prompt": prompt, "chosen": KIND[n % 3], "rejected": RUDE[n // 3 % 3]} for n, prompt in enumerate(prompts[:64])
    ]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return folder


def write_config(folder: Path, **keys: Any) -> Path:
    config = {
        "model": str(folder / "model"),
        "train_file": str(folder / "pairs.jsonl"),
        "validation_file": str(folder / "pairs.jsonl"),
        "output_dir": str(folder / "trained"),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config | keys), encoding="utf-8")
    return path


def draw_rows(seed: int, count: int) -> list[TokenizedPreference]:
    rng = random.Random(seed)

    def ids(longest: int) -> list[int]:
        return [rng.randrange(2, VOCABULARY) for _ in range(rng.randint(1, longest))]

    return [TokenizedPreference(ids(12), [*ids(30), EOS], [*ids(30), EOS]) for _ in range(count)]


def new_trainer(folder: Path, tmp_path: Path, rows: list[TokenizedPreference], keep: float) -> TokenizedDPOTrainer:
    config = DPOConfig(
        str(tmp_path), beta=0.3, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        per_device_train_batch_size=len(rows), train_sampling_strategy="sequential",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return TokenizedDPOTrainer(model, args=config, train_dataset=truncated(rows, keep), processing_class=tokenizer)


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

    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    loss = trainer.compute_loss(trainer.model, dict(batch)).item()
    reference = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float64")
    policy = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float64")
    policy.load_state_dict(trainer.model.state_dict())
    terms = []
    for row in rows:
        chosen, rejected = (ids[: math.ceil(Fraction(str(keep)) * len(ids))] for ids in (row.chosen, row.rejected))
        rewards = [log_likelihood(policy, row, ids) - log_likelihood(reference, row, ids) for ids in (chosen, rejected)]
        terms.append(math.log1p(math.exp(-0.3 * (rewards[0] - rewards[1]).item())))
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    assert abs(loss - math.log(2)) > 1e-3


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"keep": 0.5, "store": "bfloat16", "pairs": 48, "train_sampling_strategy": "group_by_length"},
        {"loss_type": "ipo", "beta": 0.5},
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
    assert (facts["kind"], facts["method"], facts["model"]) == ("policy", "dpo", "model")
    assert (facts["pairs"], facts["keep"], facts["beta"]) == (
        keys.get("pairs", 64), keys.get("keep", 1.0), keys.get("beta", 0.1)
    )  # fmt: skip
    assert facts["loss"] == keys.get("loss_type", "sigmoid")

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
