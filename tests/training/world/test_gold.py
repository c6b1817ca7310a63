"""Each aspect of the gold reward, by rule."""

import dataclasses

import pytest

from steersman.training.world.gold import MAXIMUM, Gold, score, score_sentences

PROMPT = "Customer: Hello, the refund for my kettle is missing. Can you help me? David\nAgent:"
HELLO = " Hello David."
ABOUT = " I have read your message about the kettle."
RIGHT = " As a next step, I have arranged the refund for the kettle."
NONE = " For now, I have arranged the voucher for you."
WRONG_ITEM = " I have read your message about the lamp."
KIND = " I am sorry about the trouble with your kettle."
KINDER = " You have been very patient, and I thank you for that."
RUDE = " You are wasting my time, David."
FILLER = " Well, things are what they are."


@pytest.mark.parametrize(
    ("response", "aspect", "value"),
    [
        (HELLO + ABOUT, "helpful", 0.0),
        (HELLO + RIGHT, "helpful", 1.5),
        (HELLO + NONE, "helpful", -1.0),
        (HELLO + RIGHT + NONE, "helpful", -1.0),
        (HELLO + " For now, I have arranged the repair for you.", "helpful", -1.0),
        (HELLO, "attentive", 0.0),
        (ABOUT, "attentive", 0.5),
        (WRONG_ITEM, "attentive", -0.5),
        (ABOUT + WRONG_ITEM, "attentive", -0.5),
        (ABOUT, "polite", 0.0),
        (KIND, "polite", 0.25),
        (KIND + KINDER, "polite", 0.5),
        (KIND + KINDER + " You are always welcome here, David.", "polite", 0.5),
        (ABOUT, "respect", 0.5),
        (RUDE, "respect", -0.5),
        (RUDE + " Please learn to read next time.", "respect", -1.5),
        (RUDE * 4, "respect", -2.0),
        (HELLO + ABOUT, "clear", 0.5),
        (HELLO + FILLER, "clear", 0.0),
        (ABOUT + ABOUT, "clear", 0.0),
        (HELLO + " I have read your message", "clear", 0.0),
        (" I are on it.", "clear", 0.0),
        (FILLER * 9, "clear", -1.0),
        ("", "clear", -1.0),
    ],
)
def test_aspect(response: str, aspect: str, value: float) -> None:
    assert getattr(score(PROMPT, response), aspect) == value


def test_the_best_response_has_the_maximum_and_the_total_is_the_sum() -> None:
    best = score(PROMPT, HELLO + KIND + RIGHT + KINDER)
    assert best.total == MAXIMUM == 3.5
    mixed = score(PROMPT, HELLO + ABOUT + NONE + RUDE)
    assert mixed.total == sum(dataclasses.astuple(mixed)) == -1.0 + 0.5 + 0.0 - 0.5 + 0.5


def test_the_last_customer_message_is_what_counts() -> None:
    earlier = "Customer: Hello, I want a repair of my lamp. Please help. Anna\nAgent: Hello Anna. I am on it.\n"
    assert score(earlier + PROMPT, KIND + RIGHT) == score(PROMPT, KIND + RIGHT)


def test_a_prompt_about_nothing_known_can_be_answered_politely_but_not_helpfully() -> None:
    gold = score("Customer: What is the weather?\nAgent:", HELLO + KINDER)
    assert gold == Gold(helpful=0.0, attentive=0.0, polite=0.25, respect=0.5, clear=0.5)


def test_sentences_carry_their_own_part_of_each_aspect() -> None:
    response = HELLO + KIND + NONE + RUDE + RUDE
    sentences = score_sentences(PROMPT, response)
    assert [response[scored.start : scored.end] for scored in sentences] == [HELLO, KIND, NONE, RUDE, RUDE]
    assert [scored.gold.helpful for scored in sentences] == [0, 0, -1, 0, 0]
    assert [scored.gold.attentive for scored in sentences] == [0, 0.5, 0, 0, 0]
    assert [scored.gold.polite for scored in sentences] == [0, 0.25, 0, 0, 0]
    assert [scored.gold.respect for scored in sentences] == [0, 0, 0, -1, -1]
    assert [scored.gold.clear for scored in sentences] == [0, 0, 0, 0, -0.5]
