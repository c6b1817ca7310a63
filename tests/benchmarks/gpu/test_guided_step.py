"""What guidance adds to a step: a model or a method that fails is left out, and the rest is measured."""

from pathlib import Path
from typing import Any

import pytest

from steersman.benchmarks.gpu import guided_step, models
from steersman.benchmarks.gpu.decoding import Decoding
from steersman.benchmarks.gpu.findings import read_findings

_FLAGS = ["--tiny", "--sequences", "1", "--context", "20", "--steps", "2", "--rounds", "2"]


def _run(folder: Path) -> tuple[int, list[dict[str, Any]], set[str]]:
    """The exit code, what raised, and the methods that were measured."""
    code = guided_step.main([*_FLAGS, "--out", str(folder / "findings.jsonl")])
    found = read_findings(folder / "findings.jsonl")
    measured = {finding["method"] for finding in found if finding["what"] == "step"}
    return code, [finding for finding in found if finding["what"] == "raised"], measured


def test_every_method_is_measured(tmp_path: Path) -> None:
    assert _run(tmp_path) == (0, [], set(models.METHODS))


def test_a_model_that_cannot_be_loaded_takes_its_methods_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_ready = models.make_ready

    def refuse(model: Any) -> None:
        if model.name == "vocabulary":
            raise ValueError("it differs")
        make_ready(model)

    monkeypatch.setattr(models, "make_ready", refuse)
    code, [raised], measured = _run(tmp_path)
    assert code == 1
    assert (raised["model"], raised["error"]) == ("vocabulary", "ValueError: it differs")
    assert measured == {name for name, method in models.METHODS.items() if method.model != "vocabulary"}


def test_a_method_whose_answers_fail_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Decoding.run

    def fail(self: Decoding, method: str, *rest: Any, **options: Any) -> Any:
        if method == "mixed":
            monkeypatch.setattr(self.models["policy"], "read", _raise)
        return run(self, method, *rest, **options)

    monkeypatch.setattr(Decoding, "run", fail)
    code, [raised], measured = _run(tmp_path)
    assert code == 1
    assert raised["method"] == "mixed"
    assert "could not read the answer: out of order" in raised["error"]
    assert measured == set(models.METHODS) - {"mixed"}


def _raise(*_: Any) -> Any:
    raise RuntimeError("out of order")
