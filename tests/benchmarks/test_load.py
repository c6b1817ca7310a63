"""Tables of load from made-up requests whose times are known."""

import math
import random
import statistics
from dataclasses import replace

import pytest
from matplotlib.figure import Figure

from steersman.benchmarks.load import METHODS, MIXED, arms
from steersman.benchmarks.load_tables import Objective, find, summarise
from steersman.benchmarks.load_traffic import PLAIN, Measured, Sent
from steersman.guidance.request import METHODS as KNOWN
from steersman.guidance.request import parse_guidance


def test_every_method_is_sent_and_plain_requests_lie_between_those_of_mixed_traffic() -> None:
    assert METHODS.keys() == KNOWN.keys()
    for name, guidance in METHODS.items():
        assert parse_guidance(guidance).method == name
    *own, mixed = arms(list(METHODS))
    assert [arm.name for arm in own] == [PLAIN, *METHODS]
    assert mixed.name == MIXED
    assert [kind for kind, _ in mixed.kinds][::2] == [PLAIN] * len(METHODS)
    assert [kind for kind, _ in mixed.kinds][1::2] == list(METHODS)


def test_a_line_says_what_its_requests_saw(rng: random.Random) -> None:
    good = [_sent(rng, "pargs") for _ in range(rng.randint(5, 40))]
    failed = Sent("pargs", "p", "", 0, 0.0, (), 0.0, "it failed")
    measured = Measured("pargs", 4.0, seconds=7.5, sent=[*good, failed], kl={"pargs": 2.5})
    objective = Objective(0.15, 0.02)
    rewards = [rng.gauss(0, 1) for _ in good]
    (line,) = summarise(measured, {"pargs": rewards}, objective)
    assert (line.requests, line.failed, line.kl) == (len(good) + 1, 1, 2.5)
    assert line.tokens_per_second == pytest.approx(sum(sent.tokens for sent in good) / 7.5)
    kept = [s for s in good if s.first_token <= 0.15 and (s.whole - s.first_token) / (s.tokens - 1) <= 0.02]
    assert line.goodput == pytest.approx(len(kept) / 7.5)
    assert line.gap
    assert line.gap[0] == pytest.approx(1e3 * statistics.median(gap for sent in good for gap in sent.gaps))
    assert line.first_token[1] == pytest.approx(1e3 * max(sent.first_token for sent in good))
    assert line.reward is not None
    assert line.reward.mean == pytest.approx(statistics.mean(rewards))


def test_neighbours_are_compared_with_plain_traffic_of_the_same_rate(rng: random.Random) -> None:
    lines = []
    for rate, slower in ((4.0, 1.5), (math.inf, 3.0)):
        plain = Measured(PLAIN, rate, 1.0, [_sent(rng, PLAIN, gap=0.01) for _ in range(9)])
        mixed = [_sent(rng, kind, gap=0.01 * slower) for kind in (PLAIN, "pargs") for _ in range(9)]
        for measured in (plain, Measured(MIXED, rate, 1.0, mixed, {"pargs": 1.0})):
            lines += summarise(measured, {}, Objective(1.0, 1.0))
    finding = find(lines, MIXED, Objective(1.0, 1.0))
    assert finding.sentences[0].startswith("At 4/s")
    assert finding.sentences[0].endswith("1.50 times.")
    assert finding.sentences[1].endswith("3.00 times.")
    (table,) = finding.tables
    assert table["over plain"] == ["1.00", "1.50", "1.50", "1.00", "3.00", "3.00"]


def test_answers_that_come_whole_have_no_gaps(rng: random.Random) -> None:
    plain = Measured(PLAIN, 4.0, 1.0, [_sent(rng, PLAIN) for _ in range(9)])
    whole = Measured("best_of_n", 4.0, 1.0, [replace(_sent(rng, "best_of_n"), gaps=()) for _ in range(9)])
    lines = [line for measured in (plain, whole) for line in summarise(measured, {}, Objective(1.0, 1.0))]
    finding = find(lines, MIXED, Objective(1.0, 1.0))
    (table,) = finding.tables
    assert table["over plain"] == ["1.00", ""]
    assert [bool(gap) for gap in table["between tokens"]] == [True, False]
    finding.draw(Figure())


def test_an_arm_whose_requests_all_fail_is_no_result() -> None:
    failed = Sent("pargs", "p", "", 0, 0.0, (), 0.0, "no such model")
    with pytest.raises(RuntimeError, match="every request of pargs failed: no such model"):
        summarise(Measured("pargs", 4.0, 1.0, [failed]), {}, Objective(1.0, 1.0))


def _sent(rng: random.Random, kind: str, gap: float | None = None) -> Sent:
    tokens = rng.randint(5, 60)
    gaps = tuple(rng.uniform(0.005, 0.03) if gap is None else gap for _ in range(tokens - 1))
    first = rng.uniform(0.05, 0.3)
    return Sent(kind, "prompt", "text", tokens, first, gaps, first + sum(gaps), "")
