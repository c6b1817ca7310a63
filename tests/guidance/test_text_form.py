"""The form in which a text reward model reads a prompt and an unfinished answer, and how it is chosen."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from steersman.guidance.auxiliary import Prefix, Unscorable
from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.reward_loading import inspect_checkpoint, load_reward_model
from steersman.guidance.text_form import Source
from steersman.server.config import parse_templates
from tests.support.foreign import chat_reward, save_foreign, save_pair_encoder, text_reward
from tests.support.tiny import build_tokenizer, save_reward

NEAR = {"rel": 1e-6, "abs": 5e-6}
TURNS = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "?"})
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"


@pytest.mark.parametrize("form", ["raw", "pair", TEMPLATE])
def test_the_user_chooses_the_form(tmp_path: Path, rng: random.Random, form: str) -> None:
    folder = save_foreign(tmp_path / "bare", template=None)
    base = build_tokenizer()
    model = load_reward_model("bare", str(folder), base, template=form)
    prompt, answer = [rng.randrange(2, 250) for _ in range(5)], base.encode(" fox and dog")
    text = base.decode(answer)
    expected = {
        "raw": lambda: text_reward(folder, f"user: hello\nassistant: hi\nuser: ?\nassistant: {text}"),
        "pair": lambda: text_reward(folder, "user: hello\nassistant: hi\nuser: ?", text),
        TEMPLATE: lambda: chat_reward(folder, TURNS, text, TEMPLATE),
    }[form]()
    source = Source(TURNS)
    scored, _ = model.score_answers(prompt, [answer], source)
    assert scored == pytest.approx([expected], **NEAR)
    each = model.score_text(prompt, answer, 0, source)
    assert each[-1] == pytest.approx(expected, **NEAR)
    assert model.score_text(prompt, answer, 2, source) == pytest.approx(each[2:], **NEAR)
    candidates, _ = model.score([Prefix("a", prompt, answer[:-1], source)], torch.tensor([[answer[-1]]]), None)
    assert candidates[0].tolist() == pytest.approx([expected], **NEAR)


def test_an_answer_that_the_client_began_goes_on(tmp_path: Path) -> None:
    folder = save_foreign(tmp_path / "foreign")
    base = build_tokenizer()
    model = load_reward_model("foreign", str(folder), base)
    scored, _ = model.score_answers([5], [base.encode(" fox")], Source(TURNS[:1], begun="the quick"))
    assert scored == pytest.approx([chat_reward(folder, TURNS[:1], "the quick fox")], **NEAR)


def test_a_template_that_cannot_be_rendered_is_refused_at_start(tmp_path: Path) -> None:
    folder = save_pair_encoder(tmp_path / "encoder")
    with pytest.raises(ModelRefused, match="--reward-template encoder"):
        inspect_checkpoint("encoder", str(folder), build_tokenizer(), template="{% for %}")


@pytest.mark.parametrize(
    ("value", "says"),
    [("first=nothing.jinja", "raw, pair or the path"), ("second=raw", "no reward model"), ("first", "NAME=")],
)
def test_a_flag_that_names_nothing_is_refused(value: str, says: str) -> None:
    with pytest.raises(ModelRefused, match=says):
        parse_templates([value], {"first": "path"})


def test_messages_that_do_not_fit_the_template_cannot_be_scored(tmp_path: Path) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    model = load_reward_model("strict", str(save_foreign(tmp_path / "strict", template=strict)), build_tokenizer())
    with pytest.raises(Unscorable, match="no system"):
        model.score_answers([5], [[6]], Source(({"role": "system", "content": "x"}, *TURNS)))


def test_an_added_padding_token_leaves_the_fast_path(tmp_path: Path) -> None:
    folder = save_reward(tmp_path / "padded", vocab_size=328)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<|another pad|>"})
    tokenizer.save_pretrained(folder)
    base = build_tokenizer()
    assert inspect_checkpoint("padded", str(folder), base)[2] == "causal"
    with pytest.raises(ModelRefused, match="leave the flag out"):
        inspect_checkpoint("padded", str(folder), base, template="raw")


def test_another_token_under_an_id_of_the_base_is_another_tokenizer(tmp_path: Path) -> None:
    folder = save_reward(tmp_path / "smaller")
    build_tokenizer(vocabulary=310).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<|another pad|>"})
    tokenizer.save_pretrained(folder)
    assert inspect_checkpoint("smaller", str(folder), build_tokenizer())[2] == "text"
