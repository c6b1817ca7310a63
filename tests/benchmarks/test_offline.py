"""Answers of the demo's base without a server, against decoding in plain torch."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steersman.benchmarks.offline import load_guided
from steersman.benchmarks.settings import Setting, world_prompts
from steersman.demo import MODELS
from steersman.guidance.head_files import POLICY, REWARD, read_head
from steersman.training.heads.guides import PolicyGuide, RewardGuide
from steersman.training.world.sampling import sample

PROMPTS = 4


@pytest.mark.parametrize("role", [REWARD, POLICY])
def test_greedy_answers_are_those_of_plain_torch_and_kl_is_that_of_the_sampled_tokens(
    rng: random.Random, role: str
) -> None:
    base = AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    prompts = rng.sample(world_prompts("tuning"), PROMPTS)
    texts = [str(prompt.text) for prompt in prompts]
    folder = MODELS / ("reward-head" if role == REWARD else "dpo-head")
    head, strength = read_head(folder.name, folder, role).head, rng.uniform(0.5, 2.0)
    guide = RewardGuide(head, strength) if role == REWARD else PolicyGuide(head, strength)
    guidance = (
        {"method": "pargs", "reward_model": "head", "beta": strength, "top_k": 10}
        if role == REWARD
        else {"method": "mixed", "policy": "head", "mix": strength}
    )
    guided = load_guided(*({"head": folder} if role == own else {} for own in (REWARD, POLICY)))

    likeliest = guided.answer(Setting("greedy", guidance, {"temperature": 0.0}), prompts, 0)
    expected = sample(base, tokenizer, texts, 0, "expected", guide=lambda *step: _likeliest_alone(guide(*step)))
    assert [row[0].text for row in likeliest] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert [row[0].tokens for row in likeliest] == [len(ids) for ids in expected]

    answers = [row[0] for row in guided.answer(Setting("sampled", guidance), prompts, rng.randrange(2**31))]
    compared = 0
    for text, answer in zip(texts, answers, strict=True):
        response = [*tokenizer(answer.text)["input_ids"], tokenizer.eos_token_id]
        if len(response) != answer.tokens:  # sampled in pieces that the tokenizer would not choose, or cut off
            continue
        prompt = tokenizer(text)["input_ids"]
        with torch.inference_mode():
            ids = torch.tensor([[*prompt, *response[:-1]]])
            hidden = base.model(input_ids=ids).last_hidden_state[0, len(prompt) - 1 :]
            logits = base.lm_head(hidden)
            ratios = guide(hidden, logits).log_softmax(-1) - logits.log_softmax(-1)
        own = torch.tensor(response).unsqueeze(1)
        assert answer.kl == pytest.approx(float(ratios.gather(1, own).sum()), abs=1e-3)
        if role == REWARD:
            assert answer.reward == pytest.approx(float(head(hidden)[-1, response[-1]]), abs=1e-3)
        compared += 1
    assert compared


def _likeliest_alone(logits: torch.Tensor) -> torch.Tensor:
    return torch.full_like(logits, -torch.inf).scatter(1, logits.argmax(dim=1, keepdim=True), 0.0)
