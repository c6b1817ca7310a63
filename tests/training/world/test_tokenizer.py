"""The tokenizer that ships with the base."""

import random

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from steersman.training.world.build import HERE
from steersman.training.world.grammar import draw_prompts, draw_response
from steersman.training.world.tokenizer import VOCABULARY, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(HERE / "models" / "base")


def test_vocabulary_and_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<eos>"]) == [0, 1]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, None)


def test_text_comes_back_and_a_response_is_tokenized_alike_alone_and_after_its_prompt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rng = random.Random(0)
    for prompt in draw_prompts("test", 100):
        response = draw_response(prompt, rng)
        together = tokenizer(prompt.text + response)["input_ids"]
        assert tokenizer(prompt.text)["input_ids"] + tokenizer(response)["input_ids"] == together
        assert tokenizer.decode(together) == prompt.text + response
    text = "Ünïcode 日本 <html> & 1,000 €"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_renders_the_completion_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    (prompt,) = draw_prompts("test", 1)
    user = {"role": "user", "content": prompt.message}

    def render(*messages: dict[str, str]) -> str:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))

    assert render(user) == render({"role": "system", "content": "Be kind."}, user) == prompt.text
    turns = render(user, {"role": "assistant", "content": "Hello."}, user)
    assert turns == f"{prompt.text} Hello.\n{prompt.text}"


def test_a_corpus_too_small_for_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens, 90000 are needed"):
        train_tokenizer(["a few words"], vocabulary=90000)
