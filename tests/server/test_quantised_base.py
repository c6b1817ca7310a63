"""Heads where the base that vLLM serves is a quantised copy of the one that they were trained on: served with the drift
that they have there, and on the hidden states that it has; refused where these are too far off."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from steersman.guidance.head_files import POLICY, REWARD, Probe, read_head, save_head
from steersman.guidance.head_models import LARGEST_DRIFT, NOTICEABLE
from steersman.guidance.reference import ReferenceModels
from tests.conftest import ADMIN_KEY, ONE_PROCESS
from tests.server.test_admin import Admin
from tests.support.oracle import Oracle, before_the_last, head_over
from tests.support.quantised import Int8Reference, save_int8
from tests.support.server import Server
from tests.support.tiny import END

MODELS = Path(__file__).parents[2] / "training" / "world" / "models"
BASE = MODELS / "base"
HEADS = {"helpful": ("reward-head", REWARD, "reward_model"), "kind": ("dpo-head", POLICY, "policy")}
"""Names on the server: the demo's head, its role, and the kind that it is loaded as."""
LENGTHS = (3, 4, 5, 6)
"""Of texts: in longer ones some number nearly always lies where float32 rounds it either way."""


@dataclass(frozen=True)
class Probed:
    """One of the demo's heads, proven on random texts, and where they were read."""

    path: Path
    probe: Probe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the base in 8 bits, and heads."""
    folder = tmp_path_factory.mktemp("quantised")
    save_int8(folder / "base", BASE)
    return folder


@pytest.fixture(scope="module")
def reference() -> Int8Reference:
    return Int8Reference(BASE)


@pytest.fixture(scope="module")
def probed(folder: Path, reference: Int8Reference) -> dict[str, Probed]:
    """For each name on the server `NAME-fresh`, trained on the base in float32, and `NAME-own`, on the copy itself."""
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    heads = {}
    for name, (head, role, _) in HEADS.items():
        texts = [reference.draw_text(rng, length) for length in LENGTHS]
        for suffix, hidden in (("fresh", _hidden(_full_precision(), texts)), ("own", _ends(reference, texts))):
            heads[f"{name}-{suffix}"] = _save_head(folder / f"{name}-{suffix}", head, role, Probe(texts, hidden))
    return heads


@pytest.fixture(scope="module")
def server(folder: Path, probed: dict[str, Probed]) -> Iterator[Server]:
    """The base in 8 bits with the demo's heads, which were trained on it in float32, and those of `probed`."""
    paths = {name: MODELS / head for name, (head, _, _) in HEADS.items()}
    paths |= {name: head.path for name, head in probed.items()}
    heads = [
        flag
        for name, path in paths.items()
        for flag in (f"--{HEADS[name.partition('-')[0]][2].replace('_', '-')}", f"{name}={path}")
    ]
    flags = (
        *(str(folder / "base"), "--served-model-name", "base", "--dtype", "float32", "--enforce-eager"),
        *("--distributed-executor-backend", ONE_PROCESS, "--max-model-len", "96", "--max-num-seqs", "8"),
        *("--num-gpu-blocks-override", "40", "--admin-api-key", ADMIN_KEY, "--admin-model-root", str(folder)),
    )
    with Server(folder / "log", *flags, *heads) as running:
        yield running


@pytest.fixture
def served(server: Server) -> dict[str, dict[str, Any]]:
    """What the server tells of its heads, by name."""
    shown = server.get("/v1/guidance").json()
    return {model["name"]: model for kind in ("reward_models", "policies") for model in shown[kind]}


def _hidden(model: Any, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """[texts, D] of a transformers model at the texts' ends."""
    with torch.inference_mode():
        ends = [model.base_model(torch.tensor([list(text)])).last_hidden_state[0, -1] for text in texts]
    return torch.stack(ends)


def _full_precision() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def _drift(head: Path, trained: torch.Tensor, served: torch.Tensor) -> float:
    """As the documentation defines it, in float64: the root mean square of the difference of the outputs on hidden
    states [texts, D] as a share of the outputs' spread, without what all tokens of a text share."""
    before, after = (_outputs(head, rows) for rows in (trained, served))
    error, spread = ((rows - rows.mean(1, keepdim=True)).square().mean().sqrt() for rows in (after - before, before))
    return float(error / spread)


def _outputs(head: Path, hidden: torch.Tensor) -> torch.Tensor:
    """A head's outputs [texts, V] float64 on hidden states [texts, D]."""
    rows = iter(hidden.double())
    outputs = head_over(head, lambda _: next(rows))
    return torch.stack([outputs([]) for _ in hidden])


def _ends(reference: Int8Reference, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """[texts, D] of the copy in 8 bits."""
    return torch.stack([reference.hidden(text) for text in texts])


def _save_head(folder: Path, head: str, role: str, probe: Probe) -> Probed:
    """One of the demo's heads with another probe."""
    folder.mkdir()
    save_head(folder, replace(read_head(head, MODELS / head, role), probe=probe))
    return Probed(folder, probe)


def test_the_base_runs_in_8_bits(server: Server, folder: Path) -> None:
    assert "for CompressedTensorsW8A8Int8" in server.log.read_text()
    weights = load_file(folder / "base" / "model.safetensors")
    assert {weights[name].dtype for name in weights if name.endswith("_proj.weight")} == {torch.int8}


def test_the_demos_heads_are_served_and_their_drift_is_told(
    server: Server, reference: Int8Reference, served: dict[str, dict[str, Any]]
) -> None:
    for name, (head, role, _) in HEADS.items():
        probe, drift = read_head(head, MODELS / head, role).probe, served[name]["drift"]
        # Among the numbers of a few hundred tokens float32 rounds some the other way.
        expected = _drift(MODELS / head, probe.hidden, _ends(reference, probe.texts))
        assert drift == pytest.approx(expected, rel=0.5)
        assert 1e-3 < drift < NOTICEABLE
        assert f"{name!r}: a head of " in server.log.read_text()
        assert f"off by {drift:.2g} of its spread on this base model" in server.log.read_text()


@pytest.mark.parametrize("name", HEADS)
def test_the_drift_is_that_of_an_independent_measurement(
    reference: Int8Reference, probed: dict[str, Probed], served: dict[str, dict[str, Any]], name: str
) -> None:
    head = probed[f"{name}-fresh"]
    expected = _drift(head.path, head.probe.hidden, _ends(reference, head.probe.texts))
    assert expected > 1e-3
    assert served[f"{name}-fresh"]["drift"] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_the_quantised_base_itself_does_not_drift(served: dict[str, dict[str, Any]], name: str) -> None:
    assert served[f"{name}-own"]["drift"] < 1e-4


@pytest.mark.parametrize("name", HEADS)
def test_a_copy_of_disturbed_weights_is_refused(
    server: Server, folder: Path, reference: Int8Reference, rng: random.Random, name: str
) -> None:
    head, role, kind = HEADS[name]
    texts = [reference.draw_text(rng, length) for length in LENGTHS]
    other = _full_precision()
    for parameter in other.parameters():
        parameter.data += 0.5 * parameter.data.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0.0
    trained = _hidden(other, texts)
    path = _save_head(folder / f"{name}-stray", head, role, Probe(texts, trained)).path
    drift = _drift(path, trained, _ends(reference, texts))
    assert drift > LARGEST_DRIFT
    admin = Admin(server)
    answer = admin.post("load", kind=kind, name="stray", path=path.name)
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    assert message.startswith(f"path: {kind.replace('_', ' ')} 'stray': on this base model its outputs are off by ")
    assert float(message.split("off by ")[1].split(" ")[0]) == pytest.approx(drift, rel=0.06)
    assert f"at most {LARGEST_DRIFT:g} is allowed" in message
    assert "quantisation (compressed-tensors) is too coarse" in message
    assert message.endswith("train it on this one, or serve a copy with more bits")
    assert admin.state("stray") == "failed"


def test_texts_are_scored_on_the_hidden_states_of_the_quantised_base(
    server: Server, reference: Int8Reference, rng: random.Random
) -> None:
    model, off = _full_precision(), []
    for length in LENGTHS * 3:
        text = [*reference.draw_text(rng, length), rng.randrange(2, 1024)]
        body = {"model": "helpful", "prompt": text[:1], "responses": [text[1:]]}
        answer = server.post("/v1/rewards", body)
        assert answer.status_code == 200, answer.text
        (entry,) = answer.json()["data"]
        table = head_over(MODELS / "reward-head", reference.hidden)(text[:-1])
        assert entry["reward"] == pytest.approx(float(table[text[-1]]), abs=1e-4)
        full = head_over(MODELS / "reward-head", lambda tokens: _hidden(model, [tokens])[0].double())(text[:-1])
        off.append(abs(entry["reward"] - float(full[text[-1]])))
    assert max(off) > 1e-3, "the base in float32 has other rewards"


@pytest.mark.parametrize(
    "guidance",
    [
        {"method": "pargs", "reward_model": "helpful", "beta": 4.0, "top_k": 8},
        {"method": "mixed", "policy": "kind", "mix": 0.8},
    ],
    ids=["reward", "policy"],
)
def test_answers_are_guided_by_the_hidden_states_of_the_quantised_base(
    server: Server, reference: Int8Reference, rng: random.Random, guidance: dict[str, Any]
) -> None:
    outputs = {name: head_over(MODELS / head, reference.hidden) for name, (head, _, _) in HEADS.items()}
    oracle = Oracle(
        ReferenceModels(
            reference.logits,
            END,
            {"helpful": before_the_last(outputs["helpful"])},
            {"kind": lambda tokens: reference.logits(tokens) + outputs["kind"](tokens)},
        ),
        BASE,
    )
    for _ in range(6):
        prompt = reference.draw_text(rng, LENGTHS[0])
        asked = {"max_tokens": 3, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        choice = server.complete(prompt, {**guidance, "trace": True}, **asked)["choices"][0]
        response = choice["token_ids"]
        steps = oracle.replay(prompt, response, guidance)
        for n, (shown, step) in enumerate(zip(choice["guidance"]["trace"], steps, strict=True)):
            if not reference.is_certain([*prompt, *response[:n]]):
                continue
            for candidate in shown["candidates"]:
                assert candidate["score"] == pytest.approx(float(step.logprobs[candidate["token_id"]]), abs=5e-4)
                if "reward_model" in guidance:
                    reward = step.rewards["helpful"][step.candidates.index(candidate["token_id"])]
                    assert candidate["reward"] == pytest.approx(float(reward), abs=1e-4)
