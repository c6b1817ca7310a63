"""The fused decoder serves the families it names, with every setting that changes their arithmetic."""

import random
from typing import Any

import pytest
import torch
import transformers

from steersman.guidance.auxiliary import CausalModel, Prefix
from steersman.guidance.checkpoints import find_head
from steersman.guidance.decoder import fuse_decoder
from tests.support.tiny import COMMON, VOCABULARY, randomise

_ROPE = {"rope_theta": 10_000.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "heads wider than the model": ("Llama", {"head_dim": 48}),
    "one key head for all queries": ("Llama", {"num_key_value_heads": 1}),
    "linear rope": ("Llama", {"rope_parameters": {**_ROPE, "rope_type": "linear", "factor": 2.0}}),
    "yarn": ("Qwen2", {"rope_parameters": {**_ROPE, "rope_type": "yarn", "factor": 4.0}}),
    "llama3 rope": (
        "Llama",
        {
            "rope_parameters": {
                **_ROPE,
                **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64},
                **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
            }
        },
    ),
    "windows in some layers": (
        "Qwen3",
        {"head_dim": 32, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_plain_forwards(name: str, rng: random.Random) -> None:
    family, changes = VARIANTS[name]
    plain, served = _build(family, changes).double(), _build(family, changes)
    plain.set_attn_implementation("eager")
    model = CausalModel(served, name, 2**22, 8, find_head(served))
    assert model.decoder is not None
    rows = [[rng.randrange(2, VOCABULARY) for _ in range(length)] for length in (2, 17, 40)]
    prefixes = [Prefix(n, row, []) for n, row in enumerate(rows)]
    with torch.inference_mode():
        model.catch_up(prefixes)
        last = torch.tensor([[row[-1]] for row in rows])
        logits = model.step([p.key for p in prefixes], [len(row) for row in rows], last, branches=0)[:, 0]
        expected = torch.stack([plain(input_ids=torch.tensor([row])).logits[0, -1] for row in rows])
    error = (logits - expected).abs().max()
    assert error < 1e-5 * expected.abs().max(), f"{name}: off by {error:.2g}"


def test_weights_are_held_once() -> None:
    model = _build("Llama", {"attention_bias": True})
    before = sum(p.untyped_storage().nbytes() for p in model.parameters())
    CausalModel(model, "shared", 2**22, 8, find_head(model))
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == before


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Gemma2", {"head_dim": 32}),
        ("Phi", {}),
        ("Llama", {"rope_parameters": {**_ROPE, "rope_type": "dynamic", "factor": 2.0}}),
    ],
)
def test_others_run_on_their_own_code(family: str, changes: dict[str, Any]) -> None:
    model = _build(family, changes)
    assert fuse_decoder(model, [], 512) is None


def _build(family: str, changes: dict[str, Any], seed: int = 5) -> Any:
    """Norms and biases are drawn too: as they are initialised, nobody would notice that they are left out."""
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **changes})
    model = randomise(transformers.AutoModelForCausalLM.from_config(config).float().eval(), seed, spread=0.3)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model
