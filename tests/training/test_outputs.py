"""Outputs at some tokens against those of whole forwards, and what they take of memory."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GPT2Config, LlamaConfig, PhiConfig
from trl.trainer.reward_config import RewardConfig

from steersman.training import outputs
from steersman.training.accuracy import score_last_tokens
from steersman.training.data.preferences import TokenizedPreference
from steersman.training.implicit_reward import token_log_ratios
from steersman.training.lora import add_lora
from steersman.training.outputs import likeliest_tokens, token_log_probabilities, token_logits
from steersman.training.rewards.causal import PrefixCollator, causal_rows
from steersman.training.rewards.vocabulary import VocabularyRewardTrainer
from tests.support.training import write_task

SHAPE: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.5,
}  # fmt: skip
CONFIGS = {
    "Llama": LlamaConfig(**SHAPE),
    "Gemma 2, soft-capped": Gemma2Config(**SHAPE, head_dim=16, final_logit_softcapping=3.0),
    "Phi, with a bias": PhiConfig(**SHAPE),
    "GPT-2": GPT2Config(vocab_size=90, n_embd=32, n_layer=1, n_head=2, n_positions=64, pad_token_id=0),
}


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        for value in returned if isinstance(returned, tuple | list) else [returned]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return returned


def model_of(name: str) -> Any:
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    if model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    return model


def batch_of(rng: random.Random, *lengths: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Rows padded on the right, and positions of them of which the last of all but the first row are padding."""
    longest = max(lengths)
    ids = torch.tensor([[rng.randrange(1, 90) for _ in range(n)] + [0] * (longest - n) for n in lengths])
    positions = torch.tensor([[rng.randrange(1, n) for _ in range(3)] for n in lengths])
    positions[1:, -1] = -1
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}, positions


@pytest.mark.parametrize("chunk", [outputs.CHUNK, 100], ids=["one chunk", "many"])
@pytest.mark.parametrize("name", CONFIGS)
def test_taken_logits_and_their_gradients_are_those_of_the_whole_vocabulary(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch, name: str, chunk: int
) -> None:
    monkeypatch.setattr(outputs, "CHUNK", chunk)
    model = model_of(name)
    inputs, positions = batch_of(rng, 12, 7, 9)
    tokens = torch.tensor([[[rng.randrange(90) for _ in range(4)] for _ in range(3)] for _ in range(3)])
    there = positions > 0
    whole = model(**inputs).logits
    before = (positions.clamp(min=1) - 1).unsqueeze(-1).expand(-1, -1, 90)
    expected = whole.gather(1, before).gather(2, tokens)[there]
    found = token_logits(model, model, inputs, positions, tokens)[there]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    weights = torch.randn(expected.shape)
    gradients = []
    for values in (expected, found):
        model.zero_grad()
        (weights * values).sum().backward()
        gradients.append({key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(model(**inputs).logits, whole)  # the head is as it was


@pytest.mark.parametrize("name", CONFIGS)
def test_the_likeliest_tokens_are_those_of_the_whole_distribution(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(outputs, "CHUNK", 100)
    model = model_of(name)
    inputs, positions = batch_of(rng, 12, 7, 9)
    found = likeliest_tokens(model, inputs, positions, 5, vocabulary=80)
    whole = model(**inputs).logits[..., :80]
    for row, column in (positions > 0).nonzero().tolist():
        expected = whole[row, positions[row, column] - 1].topk(5).indices
        assert found[row, column].tolist() == expected.tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probabilities_are_those_of_the_whole_distribution(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(outputs, "CHUNK", 300)
    model = model_of(name)
    inputs, _ = batch_of(rng, 12, 7)
    whole = model(**inputs).logits.log_softmax(-1)[:, :-1]
    expected = whole.gather(2, inputs["input_ids"][:, 1:].unsqueeze(-1)).squeeze(-1)
    found = token_log_probabilities(model, inputs["input_ids"], inputs["attention_mask"])
    there = inputs["attention_mask"][:, 1:] == 1
    torch.testing.assert_close(found[there], expected[there], atol=1e-4, rtol=1e-5)


def test_an_adapter_s_head_is_read_inside_of_its_wrapper(rng: random.Random) -> None:
    model = add_lora(model_of("Llama"), 4)
    inputs, positions = batch_of(rng, 8, 5)
    tokens = torch.full((2, 3, 1), 7)
    expected = model(**inputs).logits[0, positions[0] - 1, 7]
    torch.testing.assert_close(token_logits(model, model, inputs, positions, tokens)[0, :, 0], expected)


def largest_of(task: Path, work: str, vocabulary: int, length: int) -> int:
    """Elements of the largest tensor of one kind of work on rows of `length` tokens."""
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=vocabulary, pad_token_id=0, tie_word_embeddings=False, num_labels=1, **shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(task / "model")
    half = length // 2
    ids = torch.randint(2, 400, (2, length)).tolist()
    rows = [TokenizedPreference(ids[0][:half], ids[0][half:], ids[1][half:])]
    settings = RewardConfig(str(task / "out"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none")
    measured = LargestTensor()
    if work in ("accuracy", "implicit reward"):
        with measured:
            if work == "accuracy":
                score_last_tokens(model, ids)
            else:
                token_log_ratios(model, model, [(row.prompt, row.chosen) for row in rows] * 2)
        return measured.elements
    dataset, collator = causal_rows(rows, 0, seed=0), PrefixCollator(tokenizer.pad_token_id)
    trainer = VocabularyRewardTrainer(model, settings, collator, dataset, processing_class=tokenizer)
    if work == "policy":
        batch = collator(list(dataset))
        with measured:
            likeliest_tokens(model, batch, batch["positions"], 3, vocabulary)
        return measured.elements
    with measured:
        trainer.compute_loss(model, collator(list(dataset))).backward()
    return measured.elements


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("outputs"))


@pytest.mark.parametrize("work", ["loss and gradient", "accuracy", "policy", "implicit reward"])
def test_memory_does_not_grow_with_vocabulary_times_length(
    task: Path, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    monkeypatch.setattr(outputs, "CHUNK", 2**14)
    vocabulary, length = 4096, 256
    # The head itself, and its gradient, have as many elements as the vocabulary times 8.
    for rows in (length, 2 * length):
        assert largest_of(task, work, vocabulary, rows) <= max(8 * vocabulary, 2 * rows * rows)
