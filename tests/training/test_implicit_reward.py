"""The implicit reward against the formula, token by token in float64."""

import math
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from steersman.training.data.preferences import TokenizedPreference
from steersman.training.implicit_reward import implicit_accuracy, implicit_reward
from steersman.training.prefixes import SHARES, cut, tokens_at


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


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_its_own_reference_and_keeps_its_mode(training: bool) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    model = new_model(seed).train(training)
    assert not implicit_reward(model, model, draw_rows(random.Random(seed), 30), beta=0.1).any()
    assert model.training == training


def test_accuracy_by_share_is_that_of_the_rewards_of_cut_responses() -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    policy, reference = new_model(seed), new_model(seed + 1)
    rows = []
    for prompt, opening in draw_rows(rng, 40):  # some pairs share their first tokens: a tie at the shorter cuts
        rows.append(TokenizedPreference(prompt, [*opening, 3, 1], [*opening[: rng.randint(0, 40)], 4, 5, 1]))
    expected = {}
    for share in SHARES:
        cuts = [tokens_at(share, row.longer) for row in rows]
        pairs = [(row.prompt, cut(row.chosen, i), cut(row.rejected, i)) for row, i in zip(rows, cuts, strict=True)]
        chosen = implicit_reward(policy, reference, [(prompt, one) for prompt, one, _ in pairs], 0.1)
        rejected = implicit_reward(policy, reference, [(prompt, two) for prompt, _, two in pairs], 0.1)
        right = [
            0.5 if one == two else float(a > b) for (_, one, two), a, b in zip(pairs, chosen, rejected, strict=True)
        ]
        expected[f"{share:g}"] = pytest.approx(sum(right) / len(right), abs=1e-4)
    assert implicit_accuracy(policy, reference, rows, 0.1) == expected


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        implicit_reward(new_model(0), new_model(1), [([], [3, 4])], 0.1)
