"""Reward models over a cache: candidates, texts and answers get the rewards of full forwards, every token is read once,
and nothing is left behind."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from steersman.guidance.auxiliary import Prefix, Unscorable
from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.plan import Formula
from steersman.guidance.reference import Rewards
from steersman.guidance.reward_loading import load_reward_model
from steersman.guidance.rewards import CausalReward, VocabularyReward
from tests.conftest import POISON
from tests.support.oracle import causal_rewards, vocabulary_rewards
from tests.support.random_input import random_prompts
from tests.support.tiny import END, VOCABULARY

NEAR = {"abs": 1e-4}
Served = tuple[Any, Rewards]


def load(models: Path, name: str) -> Any:
    return load_reward_model(name, str(models / name), AutoTokenizer.from_pretrained(models / "base"))


@pytest.fixture(scope="module")
def loaded(models: Path) -> dict[str, Served]:
    return {
        "causal": (load(models, "first"), causal_rewards(models / "first")),
        "vocabulary": (load(models, "every"), vocabulary_rewards(models / "every")),
    }


@pytest.fixture(params=["causal", "vocabulary"])
def served(request: pytest.FixtureRequest, loaded: dict[str, Served]) -> Iterator[Served]:
    model, reference = loaded[request.param]
    model.cache._children.clear()
    yield model, reference
    assert model.describe()["cache_blocks_in_use"] == 0


@contextmanager
def counting_forwards(model: Any) -> Iterator[list[int]]:
    """Tokens of each forward, seen where they are embedded."""
    tokens: list[int] = []
    embedding = model.model.body.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].numel()))
    try:
        yield tokens
    finally:
        handle.remove()


@pytest.mark.parametrize("end_token", [None, END])
@pytest.mark.parametrize("known", [False, True], ids=["by the host", "by the device"])
def test_candidates_get_the_rewards_of_full_forwards(
    served: Served, rng: random.Random, end_token: int | None, known: bool
) -> None:
    model, reference = served
    prompts = random_prompts(rng, 3, shortest=2, longest=40)
    prefixes = [Prefix(n, prompt, []) for n, prompt in enumerate(prompts)]
    last = torch.tensor([prompt[-1] for prompt in prompts]) if known else None
    candidates = torch.randint(2, VOCABULARY, (3, 5))
    candidates[:, 0] = VOCABULARY - 1
    # The base's logits may be padded beyond what a model reads: such a reward means nothing and spoils no other.
    beyond = torch.full((3, 1), VOCABULARY + rng.randrange(9))
    with torch.inference_mode():
        rewards, read = model.score(prefixes, torch.cat((candidates, beyond), dim=1), end_token, last)
    # A vocabulary head's reward is there before its token is read, so there is none behind an end token.
    suffix = [end_token] if end_token is not None and isinstance(model, CausalReward) else []
    for n, prompt in enumerate(prompts):
        expected = reference([[*prompt, v, *suffix] for v in candidates[n].tolist()])
        torch.testing.assert_close(rewards[n, :5], expected, rtol=0, atol=1e-4)
        model.release(n)
    assert len(read) == 3
    assert read[0] == len(prompts[0]) - 1


def test_a_text_has_a_reward_after_each_of_its_tokens_from_any_on(served: Served, rng: random.Random) -> None:
    model, reference = served
    prompt, response = random_prompts(rng, 1)[0], [rng.randrange(2, VOCABULARY) for _ in range(140)]
    each = [float(reference([[*prompt, *response[: n + 1]]])[0]) for n in range(len(response))]
    for start in (0, 1, rng.randrange(140), 139):
        assert model.score_text(prompt, response, start) == pytest.approx(each[start:], **NEAR)
    assert model.score_text(prompt, response) == pytest.approx(each, **NEAR)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 7, 50])
def test_answers_are_scored_at_their_ends_and_their_prompt_is_read_once(
    served: Served, rng: random.Random, count: int, length: int
) -> None:
    model, reference = served
    prompt = random_prompts(rng, 1, length, length)[0]
    firsts = rng.sample(range(2, VOCABULARY), count)
    answers = [[first, *(rng.randrange(2, VOCABULARY) for _ in range(rng.randint(1, 30)))] for first in firsts]
    with counting_forwards(model) as forwards:
        ends, read = model.score_answers(prompt, answers)
    expected = [float(reference([[*prompt, *answer]])[0]) for answer in answers]
    assert ends == pytest.approx(expected, **NEAR)
    unread = 1 if isinstance(model, VocabularyReward) else 0
    assert read == len(prompt) + sum(len(answer) - unread for answer in answers)
    if count == 1:
        assert (len(forwards), sum(forwards)) == (2, read), "a prompt that nobody shares is read with its answer"
    assert model.score_answers(prompt, answers)[0] == pytest.approx(expected, **NEAR)


def test_an_answer_that_a_model_cannot_read_is_refused_and_leaves_nothing(served: Served, rng: random.Random) -> None:
    model, _ = served
    prompt = random_prompts(rng, 1)[0]
    for answer in ([5, VOCABULARY], [VOCABULARY, 5]):
        with pytest.raises(Unscorable, match=f"the token ids 0 to {VOCABULARY - 1}, the text holds {VOCABULARY}"):
            model.score_answers(prompt, [[6, 7], answer])


def test_a_model_whose_cached_steps_are_off_where_it_is_read_does_not_pass(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = served
    model.check()
    step = model.model.step

    def wrong(keys: Any, lengths: Any, tokens: torch.Tensor, branches: int) -> torch.Tensor:
        outputs = step(keys, lengths, tokens, branches)
        is_read = isinstance(model, CausalReward) == (branches > 0)
        return outputs + torch.randn_like(outputs) if is_read else outputs

    monkeypatch.setattr(model.model, "step", wrong)
    with pytest.raises(ModelRefused, match="cached outputs differ from plain forwards"):
        model.check()


@pytest.mark.parametrize("answers", [[[5, 7]], [[5, 7], [8]], [[5, 7], [8], [9, 6, 7]]], ids=len)
@pytest.mark.parametrize("poisoned", ["the prompt", "an answer"])
def test_rewards_that_are_not_numbers_leave_none_in_the_cache(
    models: Path, rng: random.Random, answers: list[list[int]], poisoned: str
) -> None:
    model, prompt = load(models, "broken"), [rng.randrange(2, POISON) for _ in range(rng.randint(1, 80))]
    texts = [[*prompt, POISON], answers] if poisoned == "the prompt" else [prompt, [[5, POISON, 7], *answers[1:]]]
    ends, _ = model.score_answers(*texts)
    assert torch.tensor(ends)[: None if poisoned == "the prompt" else 1].isnan().all()
    assert all(bool(layer.isfinite().all()) for layer in (*model.cache.keys, *model.cache.values))
    healthy, _ = model.score_answers(prompt, [[5, 6, 7], [8, 9]])
    expected = causal_rewards(models / "broken")
    assert healthy == pytest.approx([float(expected([[*prompt, *a]])[0]) for a in ([5, 6, 7], [8, 9])], **NEAR)


def test_a_step_costs_one_token_or_one_for_every_candidate_beside(loaded: dict[str, Served]) -> None:
    for formula, tokens in ((Formula(top_k=7), 8), (Formula(top_k=7, end_token=True), 15)):
        assert loaded["causal"][0].tokens_per_step(formula) == tokens
        assert loaded["vocabulary"][0].tokens_per_step(formula) == 1


def test_users_are_shown_the_kind_and_the_sizes(loaded: dict[str, Served]) -> None:
    for kind, name in (("causal", "first"), ("vocabulary", "every")):
        described = loaded[kind][0].describe()
        assert (described["name"], described["kind"], described["vocabulary"]) == (name, kind, VOCABULARY)
        assert described["cache_blocks"] == loaded[kind][0].cache.num_blocks
