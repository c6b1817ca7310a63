"""Copies of a base in 8 bits as vLLM serves them on a CPU, and their hidden states worked out apart from it."""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
# Symmetric activations would take another kernel on CPUs with AMX, which does not read float32.
_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True}
QUANTISATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": _WEIGHTS, "input_activations": _ACTIVATIONS}},
}
"""compressed-tensors' W8A8: weights with a scale for each output, activations rounded anew for each token."""
CERTAIN = 2e-6
"""Share of a number within which float32 may round it another way than float64 does."""


def save_int8(folder: Path, base: Path) -> Path:
    """A copy of `base` whose layers' weights are int8, with a scale [N, 1] for each [N, K]."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name, weight in tensors.items() if "layers" in name and weight.dim() == 2]:
        tensors[name], tensors[f"{name}_scale"] = round_weight(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _declare(folder, QUANTISATION)
    return folder


def declare_gptq(folder: Path) -> None:
    """Makes a checkpoint say that it is quantised by GPTQ."""
    _declare(folder, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True})


def _declare(folder: Path, quantisation: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))


def round_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] as int8 and its scales [N, 1] float32."""
    scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
    return (weight.float() / scale).round().to(torch.int8), scale


def round_activations(inputs: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Inputs [..., K] as 8 bits have them, in 255 steps from each token's least to its greatest, and how far the
    nearest number is from being rounded the other way, as a share of its size."""
    least, greatest = inputs.amin(dim=-1, keepdim=True), inputs.amax(dim=-1, keepdim=True)
    scale = (greatest - least) / 255
    steps, zero = inputs / scale, -128 - least / scale
    margin = min(float(((n - n.floor() - 0.5).abs() / (1 + n.abs())).min()) for n in (steps, zero))
    zero = zero.round()
    return ((steps.round() + zero).clamp(-128, 127) - zero) * scale, margin


class _Rounded(nn.Module):
    """A linear layer in 8 bits, computed in float64."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight, scale = round_weight(layer.weight.data)
        self.weight = weight.double() * scale.double()
        self.margin = 1.0
        """Of the last inputs."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rounded, self.margin = round_activations(inputs)
        return rounded @ self.weight.t()


class Int8Reference:
    """What `save_int8`'s copy of a base computes, in float64, from the base's own weights and without a quantisation
    library."""

    def __init__(self, base: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
        linear = [(n, m) for n, m in self._model.named_modules() if "layers" in n and isinstance(m, nn.Linear)]
        self._rounded = [_Rounded(layer) for _, layer in linear]
        for (name, _), rounded in zip(linear, self._rounded, strict=True):
            self._model.set_submodule(name, rounded)

    def hidden(self, tokens: Sequence[int]) -> torch.Tensor:
        """The last hidden state [D] behind a text."""
        return self._read(tokens)[-1]

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Next-token logits [V] behind a text."""
        with torch.inference_mode():
            logits: torch.Tensor = self._model.lm_head(self.hidden(tokens))
        return logits

    def is_certain(self, tokens: Sequence[int]) -> bool:
        """Whether float32 rounds everything in a text as float64 does: one number that it rounds the other way moves
        the hidden states by a third of what quantisation does."""
        self._read(tokens)
        return min(layer.margin for layer in self._rounded) > CERTAIN

    def draw_text(self, rng: random.Random, length: int) -> list[int]:
        """A random text that is certain."""
        vocabulary = self._model.config.vocab_size
        for _ in range(1000):
            text = [rng.randrange(2, vocabulary) for _ in range(length)]
            if self.is_certain(text):
                return text
        raise AssertionError(f"no text of {length} tokens is certain")

    def _read(self, tokens: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            states: torch.Tensor = self._model.base_model(input_ids=torch.tensor([list(tokens)])).last_hidden_state[0]
        return states
