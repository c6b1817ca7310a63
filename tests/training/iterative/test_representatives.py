"""One number for a response from its segments' scores."""

import random

import pytest
import torch

from steersman.training.aspects import PAPER, read_weights
from steersman.training.configuration import ConfigError
from steersman.training.iterative.representatives import read_representatives, represent


def test_the_paper_s_aspects_are_represented_as_in_the_paper(rng: random.Random) -> None:
    scores = [[rng.uniform(0, 4) for _ in range(5)] for _ in range(rng.randint(1, 6))]
    helpfulness, correctness, safety, completeness, clarity = zip(*scores, strict=True)
    expected = 0.3 * sum(helpfulness) / len(scores) + 0.4 * sum(correctness) / len(scores)
    expected += 0.1 * min(safety) + 0.1 * completeness[-1] + 0.1 * clarity[-1]
    found = represent(torch.tensor(scores), PAPER, read_representatives(None, list(PAPER)))
    assert found == pytest.approx(expected, abs=1e-5)


def test_other_aspects_are_given_one_in_yaml_or_json() -> None:
    own = {"wit": "last", "safety": "mean"}
    for given in (own, '{"wit": "last", "safety": "mean"}'):
        found = read_representatives(given, ["wit", "safety", "clarity"])
        assert found == {"wit": "last", "safety": "mean", "clarity": "last"}


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (None, "wit is none of 2D-DPO's aspects"),
        ({"wit": "median"}, "representatives is a mapping of aspects to mean, minimum, last, not"),
        ("wit", "representatives is a mapping"),
    ],
)
def test_an_aspect_without_one_is_refused(given: object, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_representatives(given, ["wit"])


def test_weights_are_the_paper_s_unless_given() -> None:
    assert read_weights(None) == PAPER
    assert list(PAPER.values()) == [0.3, 0.4, 0.1, 0.1, 0.1]
    assert read_weights('{"wit": 2, "care": 0}') == {"wit": 2.0, "care": 0.0}
    for given in ({}, {"wit": -1}, {"wit": True}, {"wit": float("nan")}, "{", ["wit"], {"wit": 0}):
        with pytest.raises(ConfigError, match="weights"):
            read_weights(given)
