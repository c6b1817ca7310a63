"""The contests of `benchmarks.kernels` on tiny shapes: every version gives the same, and what is written of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from steersman.benchmarks import contests, kernels
from steersman.benchmarks.contests import COMPILED, EAGER, OURS, Inputs, Version, all_contests
from steersman.benchmarks.kernels import Device, main, over_floor, run_contest, table, write_results

DEVICE = Device("test device", 4e12, 2.0)


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contests.torch, "compile", lambda function, **_: function)


def _fake_time(version: Version, sets: list[Inputs]) -> tuple[float, bool]:
    assert len(sets) >= 4
    return 3.5, True


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def test_the_versions_of_a_contest_agree() -> None:
    torch.manual_seed(int(torch.randint(2**31, ())))
    for contest in all_contests(torch.device("cpu"), [(2, 300)], context=64):
        if "samples" in contest.kernel:
            continue
        results = []
        for name in (OURS, EAGER, COMPILED):
            torch.manual_seed(7)
            inputs = contest.make_inputs()
            if inputs[0].dtype == torch.bfloat16 and "attention" in contest.kernel:
                # Triton's interpreter cannot multiply matrices in bfloat16.
                inputs = tuple(
                    t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs
                )
            answer = contest.versions[name](*inputs)
            results.append([*_tensors(answer), *_tensors(inputs)])
        for other in results[1:]:
            for own, theirs in zip(results[0], other, strict=True):
                # Which of two tied tokens comes first is torch's choice in its versions.
                if own.is_floating_point():
                    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)
        assert contest.floor_bytes > 0


def test_every_version_is_timed_twice_and_shown(tmp_path: Path) -> None:
    small = list(all_contests(torch.device("cpu"), [(2, 300)], context=64))
    timed = [row for contest in small for row in run_contest(contest, _fake_time)]
    assert len(timed) == sum(len(contest.versions) for contest in small)
    rows = table(timed, DEVICE)
    assert set(rows["version"]) >= {OURS, EAGER, COMPILED}
    assert float(rows["over floor"][0]) == pytest.approx(over_floor(timed[0], DEVICE), abs=0.01)
    assert over_floor(timed[0], DEVICE) == pytest.approx(3.5e-6 * 4e12 / timed[0].floor_bytes)
    write_results(tmp_path / "kernels", timed, DEVICE, Console(quiet=True))
    assert {path.name for path in tmp_path.iterdir()} == {"kernels.json", "kernels.md", "kernels.png"}


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err
