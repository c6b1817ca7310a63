"""The shipped models hold to the quality that was measured when they were built.

Fewer prompts and pairs are measured here than by the build, so each figure may differ by sampling alone: the margins
are five standard errors of what is measured here.
"""

import json
import math
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from steersman.guidance.head_files import HEAD_FILE, REWARD, base_facts, read_head
from steersman.training.world.build import HEADS, HERE, POLICIES, PROMPTS, REWARD_MODELS
from steersman.training.world.grammar import draw_prompts, in_split
from steersman.training.world.pairs import agreement, by_gold, read_rows
from steersman.training.world.quality import measure_head, measure_implicit_reward, measure_reward, measure_writing

MODELS = HERE / "models"
ALL = ("base", *REWARD_MODELS, *POLICIES)
OBJECTIVES = dict(zip(REWARD_MODELS, ("partial", "full", "full", "vocabulary"), strict=True))
CLASSIFIERS = [name for name, objective in OBJECTIVES.items() if objective != "vocabulary"]
SAMPLES = 250
FEW_SAMPLES = 100


@pytest.fixture(scope="module")
def quality() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((MODELS / "quality.json").read_text(encoding="utf-8"))
    return loaded


def five_errors(share: float, count: int) -> float:
    return 5 * math.sqrt(max(share * (1 - share), 1 / count) / count)


def test_all_models_together_are_small() -> None:
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 22_000_000


@pytest.mark.parametrize("name", ALL)
def test_a_model_s_weights_are_stored_in_bfloat16_and_load_in_float32_unchanged(name: str) -> None:
    kind = AutoModelForSequenceClassification if name in CLASSIFIERS else AutoModelForCausalLM
    model = kind.from_pretrained(MODELS / name)
    assert model.dtype == torch.float32
    assert (model.config.pad_token_id, model.config.eos_token_id, model.config.vocab_size) == (0, 1, 1024)
    assert model.config.head_dim == 32
    with safe_open(MODELS / name / "model.safetensors", framework="pt") as stored:
        for key in stored.keys():  # noqa: SIM118
            tensor = stored.get_tensor(key)
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(model.get_parameter(key), tensor.float())


@pytest.mark.parametrize("name", REWARD_MODELS)
def test_reward_models_say_what_they_are_and_share_the_base_s_tokenizer(name: str) -> None:
    config = json.loads((MODELS / name / "config.json").read_text(encoding="utf-8"))
    facts = config["steersman"]
    assert facts["kind"] == ("reward" if name in CLASSIFIERS else "vocabulary")
    assert facts["objective"] == OBJECTIVES[name]
    assert {"pairs", "learning_rate", "epochs", "seed", "accuracy", "gold_accuracy"} <= facts.keys()
    architecture = "LlamaForSequenceClassification" if name in CLASSIFIERS else "LlamaForCausalLM"
    assert (config["architectures"], config["pad_token_id"]) == ([architecture], 0)
    texts = [AutoTokenizer.from_pretrained(MODELS / folder).backend_tokenizer.to_str() for folder in ("base", name)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", POLICIES)
def test_policies_say_what_they_are_and_share_the_base_s_tokenizer(name: str) -> None:
    config = json.loads((MODELS / name / "config.json").read_text(encoding="utf-8"))
    facts = config["steersman"]
    assert (facts["kind"], facts["method"], facts["model"]) == ("policy", "dpo", "base")
    assert facts["keep"] == POLICIES[name]
    assert {"loss", "beta", "pairs", "learning_rate", "epochs", "batch", "seed", "accuracy"} <= facts.keys()
    assert config["architectures"] == ["LlamaForCausalLM"]
    texts = [AutoTokenizer.from_pretrained(MODELS / folder).backend_tokenizer.to_str() for folder in ("base", name)]
    assert texts[0] == texts[1]
    card = (MODELS / name / "README.md").read_text(encoding="utf-8")
    assert f"steersman serve MODEL --policy {name}=PATH_OF_THIS_FOLDER" in card


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_of_the_base_and_say_what_they_are(name: str) -> None:
    checkpoint = read_head(name, MODELS / name, HEADS[name])
    base = AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype="float32").eval()
    assert checkpoint.base == base_facts(base.config, 1024)
    assert {"loss", "pairs", "learning_rate", "epochs", "best_epoch", "seed", "accuracy"} <= checkpoint.facts.keys()
    assert (MODELS / name / HEAD_FILE).stat().st_size < 800_000
    with torch.no_grad():
        hidden = [base.model(torch.tensor([text])).last_hidden_state[0, -1] for text in checkpoint.probe.texts]
    torch.testing.assert_close(checkpoint.probe.hidden, torch.stack(hidden), atol=1e-3, rtol=1e-3)
    option = "--reward-model" if HEADS[name] == REWARD else "--policy"
    card = (MODELS / name / "README.md").read_text(encoding="utf-8")
    assert f"steersman serve base {option} {name}=PATH_OF_THIS_FOLDER" in card


def test_policies_differ_only_in_the_share_that_they_were_trained_on() -> None:
    facts = [json.loads((MODELS / name / "config.json").read_text(encoding="utf-8"))["steersman"] for name in POLICIES]
    for key in ("loss", "beta", "pairs", "learning_rate", "epochs", "batch", "seed"):
        assert len({fact[key] for fact in facts}) == 1


def test_partial_and_full_were_tuned_alike() -> None:
    facts = [json.loads((MODELS / name / "config.json").read_text())["steersman"] for name in REWARD_MODELS[:2]]
    for key in ("pairs", "learning_rate", "epochs", "batch", "seed", "model"):
        assert facts[0][key] == facts[1][key]


@pytest.mark.parametrize("split", PROMPTS)
def test_shipped_prompts_are_of_their_split(split: Any) -> None:
    rows = read_rows(HERE / "prompts" / f"{split}.jsonl")
    prompts = {prompt.text: prompt for prompt in draw_prompts(split, PROMPTS[split])}
    assert [row["prompt"] for row in rows] == list(prompts)
    for row in rows:
        assert in_split(prompts[row["prompt"]], split)
        assert row["messages"] == [{"role": "user", "content": prompts[row["prompt"]].message}]


def test_the_base_writes_as_well_as_measured(quality: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    measured = measure_writing(model, tokenizer, draw_prompts("test", SAMPLES, seed=7), seed=7)
    promised = quality["base"]
    assert promised["item_copied"] >= 0.87
    assert promised["name_copied"] >= 0.98
    assert promised["finished"] >= 0.99
    for key in ("item_copied", "name_copied", "finished"):
        # Not every response names a name: 80 % is a low estimate of how many count.
        assert abs(measured[key] - promised[key]) < five_errors(promised[key], int(0.8 * SAMPLES)), key
    assert abs(measured["gold_mean"] - promised["gold_mean"]) < 5 * promised["gold_deviation"] / math.sqrt(SAMPLES)
    assert 1.4 < promised["gold_deviation"] < 2.0


@pytest.fixture(scope="module")
def test_pairs() -> list[dict[str, Any]]:
    return read_rows(HERE / "test_pairs.jsonl")


def test_labels_agree_with_gold_as_often_as_the_noise_says(test_pairs: list[dict[str, Any]]) -> None:
    apart = [row for row in test_pairs if row["gold_chosen"] != row["gold_rejected"]]
    expected = sum(1 / (1 + math.exp(-abs(row["gold_chosen"] - row["gold_rejected"]))) for row in apart) / len(apart)
    assert abs(agreement(test_pairs) - expected) < five_errors(expected, len(apart))


def test_partial_and_vocabulary_are_above_full_on_prefixes_and_all_as_accurate_as_measured(
    quality: dict[str, Any], test_pairs: list[dict[str, Any]]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    measured = {name: measure_reward(MODELS / name, tokenizer, test_pairs) for name in REWARD_MODELS}
    for name in REWARD_MODELS:
        # The same pairs on another machine: only ties that rounding decides may fall differently.
        assert measured[name] == pytest.approx(quality["accuracy"][name], abs=0.01)
    partial, full = measured["reward-partial"], measured["reward-full"]
    error = math.sqrt(0.5 / len(by_gold(test_pairs)))
    for share in ("0.25", "0.5"):
        assert partial[share] > full[share] + 2 * error
        assert measured["reward-vocabulary"][share] > full[share] + 2 * error
    assert partial["1"] > 0.7
    assert full["1"] > 0.7


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_writes_as_well_as_measured_and_better_than_the_base(name: str, quality: dict[str, Any]) -> None:
    promised, base = quality["policies"][name], quality["base"]
    policy = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    measured = measure_writing(policy, tokenizer, draw_prompts("test", FEW_SAMPLES, seed=7), seed=7)
    assert promised["finished"] >= 0.99
    error = promised["gold_deviation"] / math.sqrt(FEW_SAMPLES)
    assert abs(measured["gold_mean"] - promised["gold_mean"]) < 5 * error
    assert measured["gold_mean"] > base["gold_mean"] + 5 * error


@pytest.mark.parametrize("name", HEADS)
def test_a_head_guides_as_well_as_measured_and_is_as_accurate(
    name: str, quality: dict[str, Any], test_pairs: list[dict[str, Any]]
) -> None:
    promised, base = quality["heads"][name], quality["base"]
    model = AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    prompts = draw_prompts("test", FEW_SAMPLES, seed=7)
    measured = measure_head(MODELS / name, HEADS[name], model, tokenizer, prompts, test_pairs, seed=7)
    error = promised["gold_deviation"] / math.sqrt(FEW_SAMPLES)
    assert abs(measured["gold_mean"] - promised["gold_mean"]) < 5 * error
    assert measured["gold_mean"] > base["gold_mean"] + 5 * error
    assert measured["accuracy"] == pytest.approx(promised["accuracy"], abs=0.01)
    assert measured["accuracy"]["0.5"] > 0.65


@pytest.mark.parametrize("name", ["dpo", "dpo-25"])
def test_a_policy_s_implicit_reward_is_as_accurate_as_measured(
    name: str, quality: dict[str, Any], test_pairs: list[dict[str, Any]]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    measured = measure_implicit_reward(MODELS / name, base, tokenizer, test_pairs)
    # The same pairs on another machine: only near ties that rounding decides may fall differently.
    assert measured == pytest.approx(quality["policies"][name]["accuracy"], abs=0.01)
    assert measured["1"] > 0.7
