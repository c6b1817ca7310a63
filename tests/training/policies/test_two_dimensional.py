"""2D-DPO's trainer: which tokens count for which segment, and its loss against the paper's formula."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from steersman.training.data.segments import SegmentedResponse
from steersman.training.policies.arguments import MethodName
from steersman.training.prefixes import truncate
from tests.support.policies import (
    compute_loss,
    draw_rows,
    log_ratios,
    log_sigmoid,
    make_trainer,
    step_away,
    token_logprobs,
)

WEIGHTS = {"first": 0.5, "second": 0.3, "third": 0.2}
BETA = 0.3


@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_every_token_of_a_response_belongs_to_its_segment_and_no_other_to_any(
    folder: Path, rng: random.Random, keep: float
) -> None:
    rows = truncate(draw_rows(rng, 6, aspects=3), keep)
    (batch,) = make_trainer(folder, "2d", rows, weights=WEIGHTS).get_train_dataloader()
    sides = [segments_of(row.chosen_segments) for row in rows] + [segments_of(row.rejected_segments) for row in rows]
    for number, segments in enumerate(sides):
        own = [k for k, (start, end) in enumerate(spans(segments)) for _ in range(start, end)]
        ids, completion = batch["segment_ids"][number], batch["completion_mask"][number]
        assert ids[completion == 1].tolist() == own
        assert (ids[completion == 0] == -1).all()
        assert batch["segment_mask"][number].tolist() == [
            k < len(segments.ends) for k in range(batch["scores"].shape[1])
        ]
        assert batch["scores"][number][: len(segments.ends)].tolist() == segments.scores


def test_a_cut_drops_the_segments_behind_it_and_divides_the_one_that_it_meets(rng: random.Random) -> None:
    for row in draw_rows(rng, 50, aspects=2):
        whole = segments_of(row.chosen_segments)
        for keep in (1.0, 0.7, 0.3, 0.01):
            (short,) = truncate([row], keep)
            left = segments_of(short.chosen_segments)
            assert left.ends[-1] == len(short.chosen)
            assert left.scores == whole.scores[: len(left.ends)]
            assert left.ends[:-1] == whole.ends[: len(left.ends) - 1]
            assert left.ends[-1] <= whole.ends[len(left.ends) - 1]
    assert truncate([replace(row, chosen_segments=None)], 0.5)[0].chosen_segments is None


@pytest.mark.parametrize(("method", "weights"), [("2d", WEIGHTS), ("1d", {"first": 1.0})])
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_the_loss_is_the_paper_s(
    folder: Path, rng: random.Random, method: MethodName, weights: dict[str, float], keep: float
) -> None:
    rows = truncate(draw_rows(rng, 6, aspects=len(weights)), keep)
    trainer = make_trainer(folder, method, rows, weights=weights, beta=BETA)
    (batch,) = trainer.get_train_dataloader()
    models = step_away(trainer, folder)
    total, chosen_tokens = 0.0, []
    for row in rows:
        sides = []
        for response, segments in ((row.chosen, row.chosen_segments), (row.rejected, row.rejected_segments)):
            own = segments_of(segments)
            ratios = log_ratios(*models, row.prompt, response)
            rewards = [sum(w * (s / 4 + 1) for w, s in zip(weights.values(), line, strict=True)) for line in own.scores]
            sides.append([(r, sum(ratios[a:b])) for r, (a, b) in zip(rewards, spans(own), strict=True)])
        total += pair_loss(*sides)
        chosen_tokens += token_logprobs(models[0], row.prompt, row.chosen)
    expected = total / len(rows) - 0.1 * sum(chosen_tokens) / len(chosen_tokens)
    assert compute_loss(trainer, batch) == pytest.approx(expected, rel=1e-4)
    assert abs(expected) > 0.1


def pair_loss(chosen: list[tuple[float, float]], rejected: list[tuple[float, float]]) -> float:
    """From the segments' rewards and summed log-ratios: the N best against the N worst, the best with the worst."""
    count = min(len(chosen), len(rejected))
    best = sorted(chosen, key=lambda s: -round(s[0], 6))[:count]
    worst = sorted(rejected, key=lambda s: round(s[0], 6))[:count]
    mean = math.fsum(reward for reward, _ in best + worst) / (2 * count)
    return -math.fsum(
        log_sigmoid(BETA / mean * (r_w * ratio_w - r_l * ratio_l))
        for (r_w, ratio_w), (r_l, ratio_l) in zip(best, worst, strict=True)
    )


def segments_of(segments: SegmentedResponse | None) -> SegmentedResponse:
    assert segments is not None
    return segments


def spans(segments: SegmentedResponse) -> list[tuple[int, int]]:
    return list(zip([0, *segments.ends[:-1]], segments.ends, strict=True))
