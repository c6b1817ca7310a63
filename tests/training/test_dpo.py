"""`steersman train dpo` from end to end on tiny models, by every method; `policies/` holds their losses."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from steersman.training import command
from steersman.training.checkpoints import read_facts
from steersman.training.data.preferences import load_preferences
from steersman.training.dpo import METHODS, load_rows
from steersman.training.implicit_reward import implicit_accuracy
from steersman.training.policies.arguments import DPOArguments, MethodName
from tests.support.policies import make_trainer
from tests.support.training import write_config, write_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("dpo"), initializer_range=0.1)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"keep": 0.5, "store": "bfloat16", "pairs": 48, "train_sampling_strategy": "group_by_length"},
        {"loss_type": "ipo", "beta": 0.5},
        {
            **{"loss_type": ["robust", "sft"], "loss_weights": [1.0, 0.1], "label_smoothing": 0.1},
            **{"f_divergence_type": "js_divergence", "curriculum": "easy_first"},
        },
        {"loss_type": "sppo_hard", "beta": 0.5},
        {"method": "tdpo1"},
        {"method": "2d", "keep": 0.7, "weights": {"helpfulness": 0.5, "safety": 0.5}},
        {"method": "1d", "lora_rank": 4, "learning_rate": 5e-2, "curriculum": "easy_first"},
        {"method": "kto", "keep": 0.5},
        {"method": "orpo", "beta": 5.0, "train_sampling_strategy": "group_by_length"},
        {"method": "simpo", "lora_rank": 4, "learning_rate": 5e-2},
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
    beta = keys.get("beta", {"2d": 0.2, "1d": 0.2, "simpo": 2.0}.get(facts["method"], 0.1))
    assert (facts["pairs"], facts["keep"], facts["beta"]) == (keys.get("pairs", 64), keys.get("keep", 1.0), beta)
    loss = keys.get("loss_type", keys.get("method", "sigmoid"))
    assert facts["loss"] == (loss if isinstance(loss, str) else " + ".join(loss))

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
        ({"method": "3d"}, [], "method is one of dpo, tdpo1, tdpo2, 1d, 2d, kto, orpo, simpo, not '3d'"),
        ({"method": "kto"}, ["--method", "3d"], "invalid choice: '3d'"),
        ({"alpha": 0.5}, [], "alpha"),
        ({"method": "tdpo2", "alpha": -1}, [], "alpha is at least 0, not -1"),
        ({"method": "tdpo2", "loss_type": "ipo"}, [], "loss_type is TRL's choice among losses, for method dpo"),
        ({"method": "tdpo1", "precompute_ref_log_probs": True}, [], "precompute_ref_log_probs: "),
        ({"method": "2d", "sft_weight": -1}, [], "sft_weight is at least 0, not -1"),
        ({"method": "2d"}, ["--weights", '{"wit": 1}'], "pairs.jsonl:1: 'chosen_segments' has no scores for 'wit'"),
        ({"method": "2d", "weights": {"wit": "much"}}, [], "weights is a mapping of aspects to numbers"),
        ({"method": "2d", "weights": {"safety": 0}}, [], "weights: one of them is above 0"),
        ({"method": "1d", "weights": {"safety": 1, "wit": 1}}, [], "method 1d has one aspect, not safety, wit"),
        ({"method": "kto", "per_device_train_batch_size": 3}, [], "an even number of at least 4, not 3"),
        ({"method": "kto", "train_sampling_strategy": "random"}, [], "train_sampling_strategy: random would tear"),
        ({"label_smoothing": 0.1}, [], "label_smoothing: loss_type robust or exo_pair takes it"),
        ({"discopop_tau": 0.1}, [], "discopop_tau: it belongs to loss_type discopop"),
        ({"f_alpha_divergence_coef": 0.1}, [], "f_alpha_divergence_coef: it belongs to f_divergence_type alpha_di"),
        ({"ref_model_sync_steps": 5}, [], "ref_model_sync_steps: it belongs to sync_ref_model"),
        ({"precompute_ref_batch_size": 5}, [], "precompute_ref_batch_size: it belongs to precompute_ref_log_probs"),
        ({"padding_free": True}, [], "padding_free: TRL falls back to padding"),
        ({"truncation_mode": "keep_end"}, [], "truncation_mode: no response is cut"),
        ({"trust_remote_code": True}, [], "trust_remote_code: checkpoints with code of their own"),
        ({"eval_strategy": "steps"}, [], "eval_strategy: nothing is evaluated during training"),
        ({"pad_token": "<none such>"}, [], "pad_token: '<none such>' is no token of"),
        ({"method": "tdpo2", "ld_alpha": 0.5}, [], "ld_alpha: it belongs to TRL's losses"),
        ({"method": "2d", "use_weighting": True}, [], "use_weighting: it belongs to TRL's losses"),
        ({"method": "tdpo1", "alpha": 0.3}, [], "alpha: it belongs to method tdpo2"),
        ({"method": "kto", "ref_model_mixup_alpha": 0.5}, [], "ref_model_mixup_alpha: it belongs to sync_ref_model"),
        ({"method": "orpo", "max_completion_length": 5}, [], "max_completion_length: no response is cut"),
        ({"method": "simpo", "generate_during_eval": True}, [], "generate_during_eval: nothing is evaluated"),
        ({"method": "simpo", "loss_type": "hinge"}, [], "loss_type: method simpo has its own, not hinge"),
        (
            {"curriculum": "easy_first", "train_sampling_strategy": "group_by_length"},
            [],
            "curriculum: easy_first has an order of its own",
        ),
    ],
)
def test_errors_are_one_line_and_exit_code_two(
    folder: Path, keys: dict[str, Any], flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["dpo", "--config", str(write_config(folder, **keys)), *flags]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("steersman train dpo: error: ")
    assert complaint in last


@pytest.mark.parametrize("method", ["dpo", "2d", "kto"])
def test_a_curriculum_feeds_the_pairs_that_differ_most_first(folder: Path, method: MethodName) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    arguments = DPOArguments(
        method=method, model="", train_file=str(folder / "pairs.jsonl"), curriculum="easy_first", pairs=30
    )
    batch, config = 8, METHODS[method].config(str(folder), use_cpu=True, bf16=False)
    rows = load_rows(arguments, config, tokenizer, 128)
    given = load_preferences(arguments.train_file, tokenizer, 128)[:30]
    assert sorted(row.score_chosen for row in rows) == sorted(row.score_chosen for row in given)
    differences = [row.score_chosen - row.score_rejected for row in rows]
    assert differences == sorted(differences, reverse=True)
    assert config.train_sampling_strategy == "sequential"

    trainer = make_trainer(folder, method, rows, per_device_train_batch_size=batch)
    seen = [ids.tolist() for fed in trainer.get_train_dataloader() for ids in prompts_of(fed)]
    order = [row.prompt for start in range(0, 30, 4) for row in rows[start : start + 4] * 2]
    if method != "kto":
        order = [row.prompt for start in range(0, 30, 8) for row in rows[start : start + 8] * 2]
    assert seen == order


def prompts_of(fed: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    masks = zip(fed["input_ids"], fed["attention_mask"], fed["completion_mask"], strict=True)
    return [ids[(attended == 1) & (completion == 0)] for ids, attended, completion in masks]


@pytest.mark.parametrize(
    ("method", "pad"), [("dpo", "<eos>"), ("tdpo2", None), ("kto", "<eos>"), ("orpo", None), ("simpo", "<eos>")]
)
def test_a_policy_learns_the_end_token_that_is_padding_too(
    folder: Path, tmp_path: Path, method: MethodName, pad: str | None
) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.eos_token == "<eos>"
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(tmp_path / "model")
    trained = []
    for model in (folder / "model", tmp_path / "model"):
        out = tmp_path / f"out-{len(trained)}"
        config = write_config(folder, method=method, num_train_epochs=1, validation_file=None, pairs=32)
        assert command.main(["dpo", "--config", str(config), "--model", str(model), "--output_dir", str(out)]) == 0
        trained.append(load_file(out / "model.safetensors"))
    for name, weight in trained[0].items():
        torch.testing.assert_close(trained[1][name], weight, atol=1e-5, rtol=1e-5)
