"""A reward model with an output for every aspect guides as the weighted sum of its outputs."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from steersman.guidance import reward_loading
from steersman.guidance.aspects import describe_aspects, weigh_outputs
from steersman.guidance.auxiliary import Prefix
from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.reward_loading import inspect_checkpoint, load_reward_model
from tests.support.random_input import random_prompts
from tests.support.tiny import VOCABULARY, save_aspects

WEIGHTS = {"wit": 0.7, "care": -0.2, "calm": 1.5}


@pytest.fixture
def folder(tmp_path: Path, rng: random.Random) -> Path:
    return save_aspects(tmp_path / "aspects", rng.randrange(2**31), WEIGHTS)


def test_candidates_texts_and_answers_get_the_weighted_sum(models: Path, folder: Path, rng: random.Random) -> None:
    served = load_reward_model("aspects", str(folder), AutoTokenizer.from_pretrained(models / "base"))
    slow = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    assert isinstance(slow, LlamaForSequenceClassification)

    def reward(ids: list[int]) -> float:
        with torch.inference_mode():
            (outputs,) = slow(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits.tolist()
        return sum(weight * output for weight, output in zip(WEIGHTS.values(), outputs, strict=True))

    prompt, *answers = random_prompts(rng, 4, shortest=3, longest=30)
    candidates = torch.randint(2, VOCABULARY, (1, 5))
    with torch.inference_mode():
        rewards, _ = served.score([Prefix("a", prompt, answers[0])], candidates, None)
    expected = [reward([*prompt, *answers[0], v]) for v in candidates[0].tolist()]
    assert rewards[0].tolist() == pytest.approx(expected, abs=1e-4)
    each = [reward([*prompt, *answers[1][: n + 1]]) for n in range(len(answers[1]))]
    assert served.score_text(prompt, answers[1]) == pytest.approx(each, abs=1e-4)
    ends, _ = served.score_answers(prompt, answers)
    assert ends == pytest.approx([reward([*prompt, *answer]) for answer in answers], abs=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_whose_outputs_are_weighed_has_one(folder: Path, rng: random.Random, bias: bool) -> None:
    model, plain = (AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    for each in (model, plain):
        each.score.bias = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0])) if bias else None
    weigh_outputs(model)
    ids = torch.tensor(random_prompts(rng, 1, shortest=5))
    with torch.inference_mode():
        expected = plain(input_ids=ids).logits @ torch.tensor(list(WEIGHTS.values()))
        torch.testing.assert_close(model(input_ids=ids).logits, expected.unsqueeze(-1), rtol=0, atol=1e-5)
    assert model.config.num_labels == model.num_labels == model.score.out_features == 1
    assert not any(parameter.requires_grad for parameter in model.score.parameters())


def test_models_of_another_kind_have_no_x(models: Path) -> None:
    config = LlamaConfig()
    assert describe_aspects(config) == {}
    config.steersman = {"kind": "full"}
    assert describe_aspects(config) == {}


def test_users_are_shown_what_each_aspect_weighs(models: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    assert inspect_checkpoint("aspects", str(folder), tokenizer)[2] == "causal"
    described = load_reward_model("aspects", str(folder), tokenizer).describe()
    assert (described["kind"], described["objective"], described["aspects"]) == ("causal", "aspects", WEIGHTS)


@pytest.mark.parametrize("where", ["segments", "tokens"])
def test_a_model_that_knows_ends_of_segments_only_is_served_with_a_warning(
    models: Path, folder: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"steersman": config["steersman"] | {"aspects_at": where}}))
    warnings: list[str] = []
    monkeypatch.setattr(reward_loading.logger, "warning", lambda text, *_: warnings.append(text))
    load_reward_model("aspects", str(folder), AutoTokenizer.from_pretrained(models / "base"))
    assert any("steers badly" in text for text in warnings) == (where == "segments")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"weights": [0.5, 0.5]}, "3 outputs, but 3 steersman.aspects and 2 steersman.weights"),
        ({"aspects": ["wit"], "weights": [1.0]}, "3 outputs, but 1 steersman.aspects"),
        ({"weights": None}, "steersman.weights, a number for each"),
        *(
            ({"weights": [1.0, value, 1.0]}, "steersman.weights, a number for each")
            for value in ("much", True, math.nan, math.inf)
        ),
        ({"aspects": "wit"}, "needs steersman.aspects, their names"),
    ],
)
def test_outputs_without_a_weight_each_are_refused(
    models: Path, folder: Path, changes: dict[str, Any], complaint: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"steersman": config["steersman"] | changes}))
    with pytest.raises(ModelRefused, match=complaint):
        inspect_checkpoint("aspects", str(folder), AutoTokenizer.from_pretrained(models / "base"))


def test_outputs_of_a_head_that_is_not_linear_cannot_be_weighed() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    facts = {"aspects": list(WEIGHTS), "weights": list(WEIGHTS.values())}
    config = RobertaConfig(vocab_size=8, **sizes, num_labels=len(WEIGHTS), steersman=facts)
    with pytest.raises(ModelRefused, match="RobertaClassificationHead as head; aspects need a linear one"):
        weigh_outputs(RobertaForSequenceClassification(config))


def test_several_outputs_without_the_kind_are_refused(models: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["steersman"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelRefused, match="has 3 outputs; a reward model has one"):
        inspect_checkpoint("aspects", str(folder), AutoTokenizer.from_pretrained(models / "base"))
