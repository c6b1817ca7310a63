"""The contests of `benchmarks.kernels` on tiny shapes: every version gives the same, and what is written of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from steersman.benchmarks import contests, kernels
from steersman.benchmarks.contests import COMPILED, EAGER, OURS, Contest, Inputs, Version, all_contests
from steersman.benchmarks.kernels import (
    Device,
    count_sets,
    main,
    measure_error,
    over_floor,
    run_contest,
    table,
    write_results,
)

DEVICE = Device("test device", 4e12, 2.0)


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contests.torch, "compile", lambda function, **_: function)


def _fake_time(version: Version, sets: list[Inputs]) -> tuple[float, bool]:
    return 3.5, True


def _small() -> list[Contest]:
    return list(all_contests(torch.device("cpu"), [(2, 300)], context=64))


def test_every_version_of_a_contest_is_right() -> None:
    torch.manual_seed(int(torch.randint(2**31, ())))
    for contest in _small():
        inputs = contest.make_inputs()
        for name in (OURS, EAGER, COMPILED):
            error = measure_error(contest, contest.versions[name], inputs)
            assert error <= contest.limit, (contest.kernel, name, error)
        assert contest.floor_bytes > 0


def test_a_version_that_is_wrong_is_marked() -> None:
    contest = _small()[0]

    def wrong(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ids, logprobs, totals = contest.versions[EAGER](logits)
        return ids, logprobs + 0.01, totals

    timed = run_contest(replace(contest, versions={OURS: wrong, EAGER: contest.versions[EAGER]}), _fake_time)
    assert [row.right for row in timed] == [False, True]
    assert table(timed, DEVICE)["error"][0].endswith("WRONG")


def test_rivals_are_compiled_for_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch gives up compiling a function past its limit of shapes, and would run it eagerly without a word."""
    compiled = []

    def count(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.undo()
    monkeypatch.setattr(contests, "_compiled", lambda f: torch.compile(f, backend=count, dynamic=False, fullgraph=True))
    shapes = [(2, 200 + n) for n in range(10)]
    every = [c for c in all_contests(torch.device("cpu"), shapes, 16) if c.kernel == "topk_logprobs, k = 10, fp32"]
    for contest in every:
        run_contest(contest, lambda version, sets: (version(*sets[0]), (1.0, True))[1], [COMPILED], 1)
    assert len(compiled) == len(shapes)


def test_what_was_measured_is_on_disk_when_the_next_contest_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = _small()[4:6]
    broken = replace(second, make_inputs=lambda: 1 / 0)
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "measure_device", lambda: DEVICE)
    monkeypatch.setattr(kernels, "time_calls", _fake_time)
    monkeypatch.setattr(kernels, "all_contests", lambda _: [first, broken])
    with pytest.raises(ZeroDivisionError):
        main(["--out", str(tmp_path / "kernels")])
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert {row["kernel"] for row in found["timed"]} == {first.kernel}


def test_every_version_is_timed_twice_and_shown(tmp_path: Path) -> None:
    small = _small()
    timed = [row for contest in small for row in run_contest(contest, _fake_time, sets_of_inputs=1)]
    assert len(timed) == sum(len(contest.versions) for contest in small)
    rows = table(timed, DEVICE)
    assert set(rows["version"]) >= {OURS, EAGER, COMPILED}
    assert float(rows["over floor"][0]) == pytest.approx(over_floor(timed[0], DEVICE), abs=0.01)
    assert over_floor(timed[0], DEVICE) == pytest.approx(3.5e-6 * 4e12 / timed[0].floor_bytes)
    write_results(tmp_path / "kernels", timed, DEVICE, Console(quiet=True))
    assert {path.name for path in tmp_path.iterdir()} == {"kernels.json", "kernels.md", "kernels.png"}


def test_inputs_are_larger_than_the_cache_together() -> None:
    for contest in _small():
        assert count_sets(contest.make_inputs()) == 64
    assert count_sets((torch.empty(64, 128_256, device="meta"),)) * 64 * 128_256 * 4 >= 4 * 60 * 2**20


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err
