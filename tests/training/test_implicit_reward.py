"""The implicit reward against the formula, token by token in float64."""

import math
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from steersman.training.accuracy import accuracy_of
from steersman.training.data import TokenizedPreference
from steersman.training.implicit_reward import implicit_reward, log_likelihood


def new_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=29, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def naive(model: LlamaForCausalLM, prompt: list[int], response: list[int]) -> float:
    """log π(y|x), one forward a token, in float64."""
    model = model.double()
    total = 0.0
    for n, token in enumerate(response):
        logits = model(input_ids=torch.tensor([prompt + response[:n]])).logits[0, -1].tolist()
        total += logits[token] - math.log(sum(map(math.exp, logits)))
    model.float()
    return total


def draw_rows(rng: random.Random, count: int) -> list[tuple[list[int], list[int]]]:
    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(29) for _ in range(rng.randint(low, high))]

    return [(ids(1, 12), ids(0, 20)) for _ in range(count)]


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_it_is_the_sum_of_the_response_s_log_ratios(batch: int) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    policy, reference = new_model(seed), new_model(seed + 1)
    rows = draw_rows(random.Random(seed), 17)
    beta = random.Random(seed).uniform(0.01, 2)
    expected = [beta * (naive(policy, *row) - naive(reference, *row)) for row in rows]
    rewards = implicit_reward(policy, reference, rows, beta, batch)
    assert (rewards.dtype, rewards.shape) == (torch.float32, (17,))
    torch.testing.assert_close(rewards.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-3)


def test_equal_rows_have_equal_values_and_a_model_s_mode_stays() -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    model = new_model(seed).train()
    rows = draw_rows(random.Random(seed), 30)
    values = log_likelihood(model, rows + rows[::-1], batch=7)
    assert torch.equal(values[:30], values[30:].flip(0))
    assert model.training
    assert not implicit_reward(model, model, rows, beta=0.1).any()


def test_responses_that_agree_up_to_the_cut_are_a_tie() -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    rows = [
        TokenizedPreference(prompt, [*opening, 3, 1], [*opening, 4, 5, 1])
        for prompt, opening in ((prompt, [7] * rng.randint(10, 20)) for prompt, _ in draw_rows(rng, 20))
    ]
    policy, reference = new_model(seed), new_model(seed + 1)
    accuracy = accuracy_of(lambda cuts: implicit_reward(policy, reference, cuts, 0.1), rows, (0.1, 0.5))
    assert accuracy == {"0.1": 0.5, "0.5": 0.5}


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        log_likelihood(new_model(0), [([], [3, 4])])
