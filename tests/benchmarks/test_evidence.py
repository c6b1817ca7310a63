"""The findings from made-up answers whose truth is known."""

import random
from collections.abc import Callable

import pytest

from steersman.benchmarks import frontier, steering
from steersman.benchmarks.answers import Answer, Answers
from steersman.benchmarks.evidence import DECODED
from steersman.benchmarks.sweep import BASE, STRENGTH
from steersman.guidance.request import parse_guidance

SEEDS, PROMPTS = 3, 20


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def _answers(gold: float, kl: float, work: int = 0) -> list[Answers]:
    token_kl = tuple([0.5] * 8 + [0.1] * 56)
    answer = Answer("text", 64, True, gold, 2 * gold, kl, work, 0, token_kl)
    return [[[answer]] * PROMPTS for _ in range(SEEDS)]


def _frontier(rng: random.Random, lift: Callable[[str], float]) -> dict[str, list[Answers]]:
    """Mixing on a straight line of gold over KL; the others a known height above it, with a little noise."""
    sweep = {}
    for n, setting in enumerate(frontier.frontier_settings("seed0")):
        on_curve = setting.name == BASE.name or setting.name in frontier.MIXING.names
        kl = float(n) if on_curve else rng.uniform(0.0, 7.0)
        noise = 0.0 if on_curve else rng.gauss(0, 1e-3)
        sweep[setting.name] = _answers(0.3 * kl + noise + (0.0 if on_curve else lift(setting.name)), kl)
    return sweep


@pytest.mark.parametrize("name", DECODED)
def test_every_setting_is_one_that_the_server_would_serve_and_has_a_name_of_its_own(name: str) -> None:
    settings = DECODED[name].settings("seed0")
    assert len({setting.name for setting in settings}) == len(settings)
    for setting in settings:
        if setting.guidance is not None:
            parse_guidance(setting.guidance)


def test_parts_share_a_setting_only_where_it_is_the_same() -> None:
    found: dict[str, object] = {}
    for part in DECODED.values():
        for setting in part.settings("seed0"):
            assert found.setdefault(setting.name, setting) == setting


def test_the_height_over_the_mixing_curve_is_what_was_added(rng: random.Random) -> None:
    lift = rng.uniform(0.2, 1.0) * rng.choice((-1, 1))
    sweep = _frontier(rng, lambda name: lift if name in frontier.LENGTH.names else 0.0)
    found = frontier.height(sweep, frontier.LENGTH.names, "gold")
    assert found is not None
    assert found.mean == pytest.approx(lift, abs=0.01)
    assert frontier.height(sweep, frontier.THRESHOLD.names, "judge") is not None


def test_settings_beyond_the_mixing_curve_are_left_out(rng: random.Random) -> None:
    sweep = _frontier(rng, lambda _: 0.0)
    far = frontier.LENGTH.names[-1]
    sweep[far] = _answers(100.0, 100.0)
    assert frontier.height(sweep, [far], "gold") is None
    found = frontier.height(sweep, frontier.LENGTH.names, "gold")
    assert found is not None
    assert found.mean == pytest.approx(0.0, abs=0.01)


def test_positions_are_counted_from_the_first_token(rng: random.Random) -> None:
    finding = frontier.positions(_frontier(rng, lambda _: 0.0))
    bands = finding.data["bands"]
    assert [band["seeds"][0] for band in bands[:4]] == pytest.approx([0.5] * 4)
    assert [band["seeds"][0] for band in bands[4:]] == pytest.approx([0.1] * 3)


def test_shares_of_work_and_gain_are_those_of_ungated_pargs(rng: random.Random) -> None:
    base, full, work = rng.uniform(-1, 1), rng.uniform(2, 3), rng.randrange(500, 900)
    share = rng.uniform(0.1, 0.9)
    sweep = {}
    for setting in steering.gate_settings("seed0"):
        gated = "gate" in (setting.guidance or {})
        gold = base if setting.name == BASE.name else base + share * (full - base) if gated else full
        sweep[setting.name] = _answers(gold, 1.0, work // 4 if gated else work)
    shares = steering.gates(sweep).data["shares"]
    assert len(shares) == sum(len(curve.values) for curve in steering.GATES)
    for values in shares.values():
        assert values["gain"]["mean"] == pytest.approx(share)
        assert values["work"]["mean"] == pytest.approx(work // 4 / work)


def test_a_budget_gains_what_gold_would_have_lost_without_it(rng: random.Random) -> None:
    lost, sweep = rng.uniform(0.2, 1.0), {}
    for setting in steering.budget_settings("seed0"):
        assert setting.guidance is not None
        falls = setting.guidance["beta"] > STRENGTH and "kl_budget" not in setting.guidance
        sweep[setting.name] = _answers(2.0 - lost * falls, 1.0)
    gains = steering.budgets(sweep).data["gain_over_no_budget"]
    assert len(gains) == len(sweep) - 6
    for gain in gains:
        assert gain["mean"] == pytest.approx(lost if gain["beta"] > STRENGTH else 0.0)
