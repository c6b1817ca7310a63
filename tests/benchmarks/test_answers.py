"""Summaries and tests of answers, without a server."""

import random
import statistics

import pytest

from steersman.benchmarks.answers import Answer, by_prompt, summarise
from steersman.benchmarks.common.rendering import markdown
from steersman.benchmarks.tables import columns, compare, p_matrix


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def _answer(rng: random.Random, gold: float | None = None, kl: float | None = 1.0) -> Answer:
    words = " ".join(rng.choice(("hello", "watch", "please", "sorry")) for _ in range(5))
    return Answer(words, rng.randrange(5, 9), rng.random() < 0.5, gold, rng.gauss(0, 1), kl, 40, 3)


def test_standard_errors_are_over_prompts_and_not_over_their_samples(rng: random.Random) -> None:
    means = [rng.gauss(0, 1) for _ in range(6)]
    answers = [[_answer(rng, mean + offset) for offset in (-2.0, 2.0)] for mean in means]
    row = summarise("steered", answers)
    assert row.gold is not None
    assert row.gold.mean == pytest.approx(statistics.fmean(means))
    assert row.gold.standard_error == pytest.approx(statistics.stdev(means) / 6**0.5)


def test_counts_are_of_all_answers(rng: random.Random) -> None:
    answers = [[_answer(rng) for _ in range(3)] for _ in range(5)]
    flat = [answer for row in answers for answer in row]
    row = summarise("steered", answers)
    assert row.finished == statistics.fmean(a.finished for a in flat)
    assert row.distinct == len({a.text for a in flat}) / 15
    assert row.auxiliary_tokens == pytest.approx(15 * 40 / sum(a.tokens for a in flat))
    assert row.rouge_l is not None
    assert summarise("steered", [row[:1] for row in answers]).rouge_l is None


def test_what_an_answer_lacks_is_left_out(rng: random.Random) -> None:
    answers = [[_answer(rng, gold=None, kl=None)] for _ in range(4)]
    assert by_prompt(answers, "gold") is None
    row = summarise("greedy", answers)
    assert (row.gold, row.kl) == (None, None)
    assert {"gold reward", "KL, nats", "ROUGE-L between samples"}.isdisjoint(columns([row]))


def test_a_better_setting_is_found_in_both_directions_and_by_the_measure_that_it_is_better_by(
    rng: random.Random,
) -> None:
    worse = [[_answer(rng, rng.gauss(0, 3))] for _ in range(40)]
    better = [[_answer(rng, (answer.gold or 0.0) + rng.uniform(0.5, 1.0))] for [answer] in worse]
    tests = compare({"worse": worse, "better": better})
    p = {(test["better"], test["by"]): test["p"] for test in tests}
    assert p["better", "gold"] < 1e-6
    assert p["worse", "gold"] > 1 - 1e-6
    assert p["better", "judge"] > 1e-5
    table = p_matrix(tests, "gold")
    assert [len(column) for column in table.values()] == [2, 2, 2]
    assert table["better"][1] == table["worse"][0] == ""


def test_a_markdown_table_has_a_line_for_every_row() -> None:
    assert markdown({"a": ["1", "2"], "b": ["3", "4"]}) == "| a | b |\n| --- | --- |\n| 1 | 3 |\n| 2 | 4 |\n"
