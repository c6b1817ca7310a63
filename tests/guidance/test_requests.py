"""A request from its start to its report, over scripted models: models that come and go, what is released and when,
what is counted, and values that arrive late."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from steersman.guidance import runtime as runtime_module
from steersman.guidance.auxiliary import Unscorable
from steersman.guidance.overlap import SameStream
from steersman.guidance.rows import Row
from steersman.guidance.runtime import GuidanceRuntime
from tests.support.device import SlowCopy
from tests.support.gpu_runtime import acting_as_gpu
from tests.support.oracle import plan_of
from tests.support.scripted import END, ScriptedReward, begin_rows, scripted_runtime

WIDTH = 12
MIXED = {"method": "mixed", "policy": "p", "mix": 0.5}
REWARDS = {"method": "pargs", "reward_model": "a", "top_k": WIDTH}


class CountingSide(SameStream):
    """Tells how often work was forked and joined."""

    def __init__(self) -> None:
        self.forks = self.joins = 0

    @contextmanager
    def fork(self) -> Iterator[None]:
        """See SideStream.fork."""
        self.forks += 1
        yield

    def join(self) -> None:
        """See SideStream.join."""
        self.joins += 1


def late_runtime(side: Any = None, **models: Any) -> GuidanceRuntime:
    """One whose values arrive at the host when SlowCopy says so."""
    SlowCopy.arrived = False
    scripted = scripted_runtime(**models)
    return GuidanceRuntime(scripted.reward_models, END, scripted.policies, side, SlowCopy)


def test_a_model_may_be_named_from_when_it_is_added_until_it_is_removed(rng: random.Random) -> None:
    runtime, late = scripted_runtime({"a": torch.randn(WIDTH)}), ScriptedReward("b", torch.randn(WIDTH))
    runtime.add(late)  # type: ignore[arg-type]
    rows = begin_rows(runtime, [REWARDS, {**REWARDS, "reward_model": "b"}, {**REWARDS, "reward_model": "b"}])
    rows[2].request.error = "an earlier failure"
    runtime.step(torch.randn(3, WIDTH), rows)
    assert [row.request.error for row in rows] == [None, None, "an earlier failure"]
    assert runtime.remove("b") is late
    assert list(runtime.reward_models) == ["a"]
    assert [row.request.error for row in rows] == [None, "'b' was unloaded", "an earlier failure"]
    runtime.step(torch.randn(3, WIDTH), rows[:1])
    assert rows[0].request.error is None


def test_a_request_is_taken_up_again_under_its_key_and_ends_with_its_report(rng: random.Random) -> None:
    runtime = scripted_runtime(policies={"p": torch.randn(WIDTH)})
    request = runtime.start("a", plan_of(MIXED), 2, 7)
    row = Row(0, request, [3, 4], [])
    runtime.step(torch.randn(1, WIDTH), [row])
    runtime.pause("a", [3, 4, 5])
    policy: Any = runtime.policies["p"]
    assert policy.released == [("a", [3, 4, 5])], "others that begin alike may reuse its cache"
    assert runtime.start("a", plan_of(MIXED), 2) is request
    assert (request.seed, runtime.start("b", plan_of(MIXED), 1).seed) == (7, 0)
    report = runtime.finish("a", [5])
    assert report is not None
    assert (report.tokens, report.guided_tokens) == (1, 1)
    assert policy.released[1:] == [("a", None)]
    assert runtime.finish("a", [5]) is None
    logits = torch.randn(1, WIDTH)
    own = logits.clone()
    runtime.step(logits, [row])
    assert torch.equal(logits, own), "its row is in the batch for a moment still"


def test_requests_that_nobody_asks_for_are_forgotten_the_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_module, "_KEPT_REQUESTS", 3)
    runtime = scripted_runtime(policies={"p": torch.randn(WIDTH)})
    for key in range(5):
        runtime.start(key, plan_of(MIXED), 1)
    policy: Any = runtime.policies["p"]
    assert policy.released == [(0, None), (1, None)]
    assert [runtime.finish(key, []) is None for key in range(5)] == [True, True, False, False, False]


def test_texts_and_answers_are_scored_by_their_model_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = scripted_runtime({"a": torch.randn(WIDTH), "b": torch.randn(WIDTH)})
    model: Any = runtime.reward_models["a"]
    model.score_text = lambda prompt, response, start, source: [0.5, prompt, response, start, source]
    model.score_answers = lambda prompt, responses, source: ([prompt, responses, source], 11)
    assert runtime.score_text("a", [3, 4], [5, 6, 7]) == [0.5, [3, 4], [5, 6, 7], 0, None]
    assert runtime.score_text("a", [3], [5, 6], 1)[3] == 1
    assert runtime.work.tokens["score"] == {"a": 5 + 3}
    assert runtime.score_answers("a", [3], [[5], [6]]) == ([[3], [[5], [6]], None], 11)
    assert runtime.work.tokens["score"] == {"a": 5 + 3 + 11}


def test_steps_and_the_rows_that_they_change_are_counted(rng: random.Random) -> None:
    runtime = scripted_runtime({"a": torch.randn(WIDTH)}, {"p": torch.randn(WIDTH)})
    rows = begin_rows(runtime, [REWARDS, MIXED, {**REWARDS, "gate": {"first_tokens": 1}}])
    runtime.step(torch.randn(3, WIDTH), rows)
    assert (runtime.work.steps, runtime.work.rows) == (1, 3)
    for row in rows:
        row.output = [5]
    runtime.step(torch.randn(3, WIDTH), rows)
    assert (runtime.work.steps, runtime.work.rows) == (2, 5)
    runtime.step(torch.randn(3, WIDTH), [])
    assert (runtime.work.steps, runtime.work.rows) == (2, 5), "nobody was guided"


def test_a_gate_counts_what_it_spares_of_each_model(rng: random.Random) -> None:
    runtime = scripted_runtime({"a": torch.randn(WIDTH)}, {name: torch.randn(WIDTH) for name in "pq"})
    guidance = {**REWARDS, "top_k": 4, "policies": {"p": 0.5, "q": 0.5}, "gate": {"first_tokens": 1}}
    (row,) = begin_rows(runtime, [guidance])
    for output, spared in (([], (0, 0)), ([5], (5, 2)), ([5, 6], (10, 4))):
        row.output = output
        runtime.step(torch.randn(1, WIDTH), [row])
        counts = row.request.counts
        assert (counts.saved_reward_model_tokens, counts.saved_policy_tokens) == spared


def test_before_caches_change_hands_what_runs_on_the_second_stream_is_joined(rng: random.Random) -> None:
    side = CountingSide()
    runtime = late_runtime(side, rewards={"a": torch.randn(WIDTH)})
    model: Any = runtime.reward_models["a"]
    model.score_text, model.score_answers = lambda *_: [0.5], lambda *_: ([0.5], 1)
    runtime.start("a", plan_of(REWARDS), 1)
    for act in (
        lambda: runtime.score_text("a", [3], [5]),
        lambda: runtime.score_answers("a", [3], [[5]]),
        lambda: runtime.step(torch.randn(1, WIDTH), []),
        lambda: runtime.pause("a"),
        lambda: runtime.finish("a", []),
        lambda: runtime.remove("a"),
    ):
        before = side.joins
        act()
        assert side.joins == before + 1


def test_values_are_used_when_they_have_arrived_or_are_waited_for() -> None:
    runtime, used = late_runtime(policies={"p": torch.randn(WIDTH)}), []
    runtime.read_late(torch.tensor([3, 4]), used.append)
    runtime.settle()
    assert used == []
    runtime.settle(wait=True)
    assert used == [[3, 4]]
    runtime.read_late(torch.tensor([5]), used.append)
    SlowCopy.arrived = True
    runtime.settle()
    assert used == [[3, 4], [5]]


def failing(runtime: GuidanceRuntime) -> Row:
    """A row whose failure has not arrived yet."""
    (row,) = begin_rows(runtime, [REWARDS])
    runtime.step(torch.randn(1, WIDTH), [row])
    assert row.request.error is None
    return row


def test_a_failure_that_is_under_way_is_in_the_report(rng: random.Random) -> None:
    runtime = late_runtime(rewards={"a": torch.full((WIDTH,), math.nan)})
    failing(runtime)
    report = runtime.finish(0, [])
    assert report is not None
    assert report.error == "reward model 'a' returned a reward that is not a finite number"


def test_a_failure_that_is_under_way_comes_before_the_model_that_is_removed(rng: random.Random) -> None:
    runtime = late_runtime(rewards={"a": torch.full((WIDTH,), math.nan)})
    row = failing(runtime)
    runtime.remove("a")
    assert row.request.error == "reward model 'a' returned a reward that is not a finite number"


def test_a_row_that_has_failed_asks_no_model_and_ends(rng: random.Random) -> None:
    runtime = late_runtime(rewards={"a": torch.full((WIDTH,), math.nan)})
    row = failing(runtime)
    SlowCopy.arrived = True
    model: Any = runtime.reward_models["a"]
    model.outputs = torch.randn(WIDTH)
    model.score = lambda *_: pytest.fail("the model is asked")
    logits = torch.randn(2, WIDTH)
    own = logits.clone()
    runtime.step(logits, [row])
    assert logits[0].exp().nonzero().flatten().tolist() == [END]
    assert torch.equal(logits[1], own[1])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("end", [END, None])
def test_a_failed_row_ends_where_there_is_an_end_token_that_no_client_masks(
    rng: random.Random, end: int | None, masked: bool
) -> None:
    runtime = GuidanceRuntime(scripted_runtime({"a": torch.randn(WIDTH)}).reward_models, end)
    rows = begin_rows(runtime, [REWARDS, REWARDS])
    for row in rows:
        row.request.error = "failed"
    logits = torch.randn(3, WIDTH)
    own, biased = logits.clone(), logits.clone()
    if masked:
        biased[1, END] = -torch.inf
    runtime.step(logits, rows[::-1], biased=biased if masked else None)
    ended = [] if end is None else [0] if masked else [0, 1]
    for n in range(3):
        if n in ended:
            assert logits[n].exp().nonzero().flatten().tolist() == [END]
        else:
            assert torch.equal(logits[n], own[n])


def test_what_is_read_ahead_is_of_use_to_one_step(rng: random.Random) -> None:
    side, reads, policy = CountingSide(), [], torch.randn(WIDTH)
    runtime = late_runtime(side, rewards={"a": torch.randn(WIDTH)}, policies={"p": policy})
    model: Any = runtime.policies["p"]
    read = model.read
    model.read = lambda *given: reads.append(given) or read(*given)
    rows = begin_rows(runtime, [MIXED, REWARDS])
    fed = torch.tensor([0, 1])
    runtime.read_ahead(rows[1:], lambda: pytest.fail("nothing is certain to be needed"))
    assert side.forks == 0
    runtime.read_ahead(rows, lambda: fed)
    assert (side.forks, len(reads)) == (1, 1)
    for count in (1, 2):
        logits = torch.randn(2, WIDTH)
        expected = 0.5 * logits[0] + 0.5 * policy
        runtime.step(logits, rows, fed)
        torch.testing.assert_close(logits[0].log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=1e-5)
        assert len(reads) == count


@pytest.mark.parametrize("chosen", [[0, 1, 2], [2, 0], [1], [0, 1]])
def test_a_step_reads_the_last_tokens_that_the_device_knows(rng: random.Random, chosen: list[int]) -> None:
    def policy_of(tokens: list[int]) -> torch.Tensor:
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(tokens[-1]))

    runtime = scripted_runtime(policies={"p": policy_of})
    rows = begin_rows(runtime, [MIXED] * 3)
    for row in rows:
        row.output = [-1]
    logits, fed = torch.randn(3, WIDTH), torch.tensor(rng.sample(range(2, 100), 3))
    guided = logits.clone()
    runtime.step(guided, [rows[n] for n in chosen], fed)
    for n in chosen:
        expected = 0.5 * logits[n] + 0.5 * policy_of([int(fed[n])])
        torch.testing.assert_close(guided[n].log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=1e-5)


def test_a_report_tells_what_was_spent_where_there_is_a_budget(rng: random.Random) -> None:
    runtime = scripted_runtime(policies={"p": torch.randn(WIDTH)})
    rows = begin_rows(runtime, [MIXED, {**MIXED, "kl_budget": 1000.0}])
    logits = torch.randn(2, WIDTH)
    guided = logits.clone()
    runtime.step(guided, rows)
    reports = [runtime.finish(n, [3]) for n in (0, 1)]
    p, q = guided[1].double().log_softmax(-1), logits[1].double().log_softmax(-1)
    assert [report.kl_spent for report in reports if report is not None] == [
        None,
        pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3),
    ]


def test_a_policy_behind_the_gate_of_another_is_read_where_it_opens(rng: random.Random) -> None:
    runtime = scripted_runtime(policies={name: torch.randn(WIDTH) for name in "pq"})
    model: Any = runtime.policies["p"]
    read, asked = model.read, []
    model.read = lambda prefixes, last: asked.append([p.key for p in prefixes]) or read(prefixes, last)
    gates = [{"kl_above": threshold, "policy": "q"} for threshold in (1e6, 0.0)]
    rows = begin_rows(runtime, [{**MIXED, "gate": gate} for gate in gates])
    runtime.step(torch.randn(2, WIDTH), rows)
    assert asked == [[1]]
    assert [row.request.counts.saved_policy_tokens for row in rows] == [1, 0]


@pytest.mark.parametrize(
    "guidance",
    [
        MIXED,
        {"method": "kl_threshold", "policy": "p", "threshold": 0.0},
        {**REWARDS, "gate": {"kl_above": 0.0, "policy": "p"}},
    ],
    ids=["formula", "method's gate", "gate"],
)
def test_a_row_that_its_policy_cannot_read_fails_alone(rng: random.Random, guidance: dict[str, Any]) -> None:
    policy = torch.randn(WIDTH)

    def policy_of(tokens: list[int]) -> torch.Tensor:
        if tokens[0] == 1:
            raise Unscorable("policy 'p' has no room")
        return policy

    runtime = scripted_runtime({"a": torch.randn(WIDTH)}, {"p": policy_of})
    rows = begin_rows(runtime, [guidance] * 3)
    logits = torch.randn(3, WIDTH)
    own = logits.clone()
    runtime.step(logits, rows)
    assert [row.request.error is None for row in rows] == [True, False, True]
    assert "policy 'p' has no room" in str(rows[1].request.error)
    assert logits[1].exp().nonzero().flatten().tolist() == [END]
    assert [torch.equal(logits[n], own[n]) for n in (0, 2)] == [False, False]


def test_a_row_whose_rewards_of_every_token_cannot_be_read_fails_alone(rng: random.Random) -> None:
    rewards = torch.randn(WIDTH)

    def rewards_of(tokens: list[int]) -> torch.Tensor:
        if tokens[0] == 1:
            raise Unscorable("reward model 'a' has no room")
        return rewards

    runtime = scripted_runtime(heads={"a": rewards_of})
    rows = begin_rows(runtime, [{**REWARDS, "top_k": None, "beta": 1.0}] * 3)
    logits = torch.randn(3, WIDTH)
    expected = (logits + rewards).log_softmax(-1)
    runtime.step(logits, rows)
    assert [row.request.error is None for row in rows] == [True, False, True]
    torch.testing.assert_close(logits[[0, 2]].log_softmax(-1), expected[[0, 2]], rtol=0, atol=1e-5)


def test_no_reward_model_is_asked_for_a_row_whose_policy_has_failed(rng: random.Random) -> None:
    def policy_of(tokens: list[int]) -> torch.Tensor:
        if tokens[0] == 1:
            raise Unscorable("policy 'p' has no room")
        return torch.zeros(WIDTH)

    for models in ({"rewards": {"a": torch.randn(WIDTH)}}, {"heads": {"a": torch.randn(WIDTH)}}):
        runtime = scripted_runtime(policies={"p": policy_of}, **models)  # type: ignore[arg-type]
        model: Any = runtime.reward_models["a"]
        read, asked = model.read, []
        model.read = lambda prefixes, *more, read=read, asked=asked: (
            asked.append([p.key for p in prefixes]) or read(prefixes, *more)
        )
        top_k = WIDTH if "rewards" in models else None
        guidance = {**REWARDS, "top_k": top_k, "policies": {"p": 1.0}}
        runtime.step(torch.randn(3, WIDTH), begin_rows(runtime, [guidance] * 3))
        assert asked == [[0, 2]]


def test_rows_behind_a_closed_gate_are_the_bases_and_count_for_nothing(rng: random.Random) -> None:
    runtime = scripted_runtime(policies={"p": torch.randn(WIDTH)})
    closed = {"method": "kl_threshold", "policy": "p", "threshold": 1e6}
    rows = begin_rows(runtime, [closed, MIXED])
    logits = torch.randn(2, WIDTH)
    own = logits.clone()
    runtime.step(logits, rows)
    assert torch.equal(logits[0], own[0])
    assert runtime.work.rows == 1


@pytest.mark.parametrize("device", [nullcontext, acting_as_gpu], ids=["plain", "kernels"])
def test_a_kl_gate_in_front_of_rewards_holds_and_spares_them_on_either_device(rng: random.Random, device: Any) -> None:
    with device():
        runtime = scripted_runtime({"a": torch.randn(WIDTH)}, {"p": torch.randn(WIDTH)})
        gates = [{"kl_above": threshold, "policy": "p"} for threshold in (1e6, 0.0)]
        rows = begin_rows(runtime, [{**REWARDS, "top_k": 3, "gate": gate} for gate in gates])
        logits = torch.randn(2, WIDTH)
        own = logits.clone()
        runtime.step(logits, rows)
    assert [torch.equal(logits[n], own[n]) for n in (0, 1)] == [True, False]
    assert [row.request.counts.saved_reward_model_tokens for row in rows] == [4, 0]
