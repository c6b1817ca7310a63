"""A reward model with a vocabulary head: one output is one next token's reward, wherever it is asked."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from steersman.guidance.auxiliary import Prefix
from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.reward_loading import load_reward_model
from steersman.guidance.rewards import VocabularyReward
from tests.support.oracle import vocabulary_rewards
from tests.support.random_input import random_prompts
from tests.support.tiny import VOCABULARY, save_reward, save_vocabulary_reward


@pytest.fixture
def model(models: Path) -> VocabularyReward:
    loaded = load_reward_model("every", str(models / "every"), AutoTokenizer.from_pretrained(models / "base"))
    assert isinstance(loaded, VocabularyReward)
    return loaded


def test_candidates_texts_and_answers_get_the_rewards_of_full_forwards(
    model: VocabularyReward, models: Path, rng: random.Random
) -> None:
    reference = vocabulary_rewards(models / "every")
    prompt, *answers = random_prompts(rng, 4, shortest=3, longest=30)
    candidates = torch.randint(VOCABULARY, (1, 5))
    with torch.inference_mode():
        rewards, read = model.score([Prefix("a", prompt, answers[0])], candidates, None)
    text = [*prompt, *answers[0]]
    torch.testing.assert_close(rewards[0], reference([[*text, v] for v in candidates[0].tolist()]), rtol=0, atol=1e-4)
    assert read == [len(text) - 1]
    each = reference([[*prompt, *answers[1][: n + 1]] for n in range(len(answers[1]))])
    assert model.score_text(prompt, answers[1]) == pytest.approx(each.tolist(), abs=1e-4)
    ends, read_for_all = model.score_answers(prompt, answers)
    assert ends == pytest.approx(reference([[*prompt, *answer] for answer in answers]).tolist(), abs=1e-4)
    # The prompt may be in the cache already; every answer's last token is read.
    assert len(answers) <= read_for_all <= len(prompt) + sum(map(len, answers))
    model.release("a")
    assert model.describe()["cache_blocks_in_use"] == 0


@pytest.mark.parametrize(
    ("change", "way_out"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "one output a token"),
        ({"vocab_size": 300}, "300 token ids"),
    ],
)
def test_a_checkpoint_that_has_no_such_head_is_refused(
    models: Path, tmp_path: Path, change: dict[str, object], way_out: str
) -> None:
    folder = save_vocabulary_reward(tmp_path / "other", seed=3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelRefused, match=way_out):
        load_reward_model("other", str(folder), AutoTokenizer.from_pretrained(models / "base"))


def test_a_classifier_is_not_taken_for_one(models: Path, tmp_path: Path) -> None:
    save_reward(tmp_path / "plain", seed=4)
    loaded = load_reward_model("plain", str(tmp_path / "plain"), AutoTokenizer.from_pretrained(models / "base"))
    assert loaded.kind == "causal"
