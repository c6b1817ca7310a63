"""Hidden states of the frozen base: those of plain forwards, computed once, and removed where nobody named a cache."""

import os
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from steersman.training.errors import ConfigError
from steersman.training.heads import features
from steersman.training.heads.examples import read_response
from steersman.training.heads.features import Features, Reading, compute_features, feature_folder
from steersman.training.heads.frozen_base import FrozenBase
from tests.support import tiny
from tests.support.quantised import Int8Reference, declare_gptq, save_int8
from tests.support.random_input import random_prompts

CPU = torch.device("cpu")
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2}
GEMMA = {"head_dim": 32, "final_logit_softcapping": 3.0}


def random_readings(rng: random.Random, count: int = 12) -> list[Reading]:
    """Of prompts and responses of all lengths, some at every token and some at a few."""
    readings = []
    for prompt in random_prompts(rng, count):
        response = [rng.randrange(2, 300) for _ in range(rng.randint(1, 20))]
        cuts = sorted(rng.sample(range(1, 25), 4)) if rng.random() < 0.5 else None
        readings.append(read_response(prompt, response, cuts))
    return readings


def compute(base: FrozenBase, readings: list[Reading], folder: Path, tokens: int = 200) -> Features:
    return compute_features(base, readings, folder, tokens=tokens, what="rows")


def test_states_of_a_quantised_base_are_those_that_it_computes(tmp_path: Path, rng: random.Random) -> None:
    """As vLLM computes them: activations are rounded too."""
    path = tiny.save_base(tmp_path / "base", rng.randrange(1000))
    reference, base = Int8Reference(path), FrozenBase(str(save_int8(tmp_path / "quantised", path)), CPU)
    texts = [reference.draw_text(rng, length) for length in (3, 5, 7)]
    for text in texts:
        (states,) = base.hidden([text])
        torch.testing.assert_close(states[-1].double(), reference.hidden(text), rtol=1e-4, atol=1e-4)
    base.check_output_layer(texts)
    assert base.fingerprint() != FrozenBase(str(path), CPU).fingerprint()


def test_what_a_quantised_base_needs_is_named_where_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.quantizers.quantizer_gptq.is_optimum_available", lambda: False)
    path = tiny.save_base(tmp_path / "base")
    declare_gptq(path)
    with pytest.raises(ConfigError, match=r"base can't be loaded: .*GPTQ.*requires"):
        FrozenBase(str(path), CPU)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {}),
        ("GPT2", GPT2),
        ("Gemma2", GEMMA),
        ("Cohere", {"logit_scale": 0.2}),
    ],
)
def test_states_and_logits_are_those_of_plain_forwards(
    rng: random.Random, tmp_path: Path, kind: str, changes: dict[str, float]
) -> None:
    path = tiny.save_base(tmp_path / "base", rng.randrange(1000), kind, **changes)
    base, readings = FrozenBase(str(path), CPU), random_readings(rng)
    base.check_output_layer([reading.ids for reading in readings[:3]])
    found = compute(base, readings, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    for n, reading in enumerate(readings):
        with torch.no_grad():
            plain = model(torch.tensor([reading.ids]), output_hidden_states=True)
        own = found.states[found.starts[n] : found.starts[n + 1]].float()
        before = torch.tensor(reading.places) - 1
        torch.testing.assert_close(own, plain.hidden_states[-1][0, before], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(base.logits(own), plain.logits[0, before], atol=1e-2, rtol=1e-2)


def test_an_output_layer_that_takes_something_else_is_refused(rng: random.Random, tmp_path: Path) -> None:
    base = FrozenBase(str(tiny.save_base(tmp_path, rng.randrange(1000))), CPU)
    head = base.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _module, inputs: (inputs[0] / 1.1,) if inputs[0].dim() == 3 else None)
    with pytest.raises(ConfigError, match="logits that its last hidden state does not give"):
        base.check_output_layer([[5, 6, 7]])


def test_states_are_kept_as_a_base_in_bfloat16_computes_them(rng: random.Random, tmp_path: Path) -> None:
    path = tiny.save_base(tmp_path / "base", rng.randrange(1000))
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    base, readings = FrozenBase(str(path), CPU), random_readings(rng, 3)
    found = compute(base, readings, tmp_path)
    assert found.states.dtype == torch.bfloat16
    with torch.no_grad():
        plain = base.model(torch.tensor([readings[0].ids]), output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(found.states[0], plain[readings[0].places[0] - 1], rtol=2e-2, atol=5e-2)


def test_moments_are_those_of_all_states(rng: random.Random, tmp_path: Path) -> None:
    states = (torch.randn(20_000, 5) * torch.tensor([1, 3, 1e-3, 10, 0]) + torch.tensor([0, 50, 1, -3, 2])).half()
    mean, deviation = Features(states, [0, len(states)]).moments()
    torch.testing.assert_close(mean, states.double().mean(0).float(), atol=1e-4, rtol=1e-4)
    expected = states.double().std(0, unbiased=False).float()
    torch.testing.assert_close(deviation[:4], expected[:4], atol=1e-5, rtol=1e-3)
    assert deviation[4] == 1  # what never changes is not divided by 0


def test_the_same_base_and_rows_are_computed_once_and_others_again(
    rng: random.Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, readings = FrozenBase(str(tiny.save_base(tmp_path / "base", 1)), CPU), random_readings(rng)
    first = compute(base, readings, tmp_path / "base").states.clone()
    count = sum(len(reading.places) for reading in readings)
    assert f"features of rows: {count} hidden states of 64 numbers" in capsys.readouterr().err
    moved = FrozenBase(str(tiny.save_base(tmp_path / "moved", 1)), CPU)
    monkeypatch.setattr(FrozenBase, "hidden", None)
    assert torch.equal(compute(moved, readings, tmp_path / "base").states, first)
    assert "are there already" in capsys.readouterr().err
    monkeypatch.undo()
    other = FrozenBase(str(tiny.save_base(tmp_path / "other", 2)), CPU)
    places = [*readings[:-1], Reading(readings[-1].ids, readings[-1].places[:-1] or [1])]
    for changed in (compute(other, readings, tmp_path / "base"), compute(base, places, tmp_path / "base")):
        assert changed.states.shape != first.shape or not torch.equal(changed.states, first)
    assert len(list((tmp_path / "base").glob("features-*.bin"))) == 3


def test_a_cache_is_kept_only_where_it_was_named(tmp_path: Path) -> None:
    with feature_folder(None, tmp_path / "out") as folder:
        (folder / "features-left-by-a-killed-training").touch()
    assert not folder.exists()
    folder.mkdir()
    (folder / "features-left-by-a-killed-training").touch()
    found = []

    def stop() -> None:
        with feature_folder(None, tmp_path / "out") as folder:
            found.extend(folder.iterdir())
            raise SystemExit

    with pytest.raises(SystemExit):
        stop()
    assert found == []
    assert not folder.exists()
    with feature_folder(str(tmp_path / "named" / "cache"), tmp_path / "out") as folder:
        (folder / "features").touch()
    assert (tmp_path / "named" / "cache" / "features").exists()


def test_a_full_disk_and_a_stop_leave_no_file(
    rng: random.Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, readings = FrozenBase(str(tiny.save_base(tmp_path / "base", 1)), CPU), random_readings(rng, 3)
    (tmp_path / "cache").mkdir()

    def full(*_: int) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr(features.os, "posix_fallocate", full)
        with pytest.raises(ConfigError, match="No space left on device; name a folder on another disk"):
            compute(base, readings, tmp_path / "cache")
    monkeypatch.setattr(FrozenBase, "hidden", lambda *_: (_ for _ in ()).throw(SystemExit()))
    with pytest.raises(SystemExit):
        compute(base, readings, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_states_that_are_not_finite_are_refused(rng: random.Random, tmp_path: Path) -> None:
    base, readings = FrozenBase(str(tiny.save_base(tmp_path / "base", 1)), CPU), random_readings(rng, 3)
    with torch.no_grad():
        base.model.get_parameter("model.norm.weight").fill_(1e6)
    with pytest.raises(ConfigError, match="hidden states that are not finite in float16"):
        compute(base, readings, tmp_path)
