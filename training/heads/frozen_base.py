"""The frozen base model of a head: its hidden states as its output layer takes them, and its logits from these."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from steersman.guidance.checkpoints import ModelRefused, declared_quantization, find_language_head, is_causal
from steersman.guidance.head_files import BaseFacts, base_facts
from steersman.training.configuration import ConfigError, load

READ_TOKENS = 2**14
"""In one forward."""
_SAMPLED = 1024  # numbers of each weight that tell two models apart


class FrozenBase:
    """A causal language model in the precision of its checkpoint, which is the one that it is served in."""

    def __init__(self, path: str, device: torch.device) -> None:
        """Raises ConfigError for a model that can't be loaded or isn't causal."""
        model, _ = load(path, AutoModelForCausalLM, dtype="auto")
        if not is_causal(model.config):
            raise ConfigError(f"model: {path} is no causal language model: a head belongs to one that is steered")
        self.path = path
        self.model: PreTrainedModel = model.eval().requires_grad_(False).to(device)
        if declared_quantization(model.config) is not None:
            self._expand_weights()
        try:
            self._head = find_language_head(self.model)
        except ModelRefused as error:
            raise ConfigError(f"model: {path}: {error}") from None

    @torch.inference_mode()
    def _expand_weights(self) -> None:
        # Quantised weights are expanded in the first forward of the whole model, not in one of its body.
        model: Any = self.model
        model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=self.model.device), use_cache=False)

    @property
    def facts(self) -> BaseFacts:
        """What a head's checkpoint records of it."""
        return base_facts(self.model.config, self.output_rows.shape[0])

    @property
    def output_rows(self) -> Tensor:
        """Weights [V, D] of its output layer."""
        layer: Any = self.model.get_output_embeddings()
        weight: Tensor = layer.weight
        return weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] float32 of hidden states [..., D] of any precision: scales and soft caps of the architecture
        included."""
        return self._head(hidden.to(self.output_rows.dtype)).float()

    @torch.inference_mode()
    def hidden(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Last hidden states [N, T, D] of token ids. Shorter texts are padded on the right, where nothing of a causal
        model's earlier positions depends on it."""
        longest = max(map(len, texts))
        ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
        device = self.model.device
        body: Any = self.model.base_model
        states: Tensor = body(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
        ).last_hidden_state
        return states

    def iterate(self, texts: Sequence[Sequence[int]], tokens: int) -> Iterator[tuple[list[int], Tensor]]:
        """Indices of texts of like length and their hidden states [B, T, D], about `tokens` tokens at a time, the
        longest texts first: what does not fit memory shows at once."""
        order = sorted(range(len(texts)), key=lambda n: -len(texts[n]))
        start = 0
        while start < len(order):
            rows = order[start : start + max(1, tokens // len(texts[order[start]]))]
            yield rows, self.hidden([texts[n] for n in rows])
            start += len(rows)

    @torch.inference_mode()
    def check_output_layer(self, texts: Sequence[Sequence[int]]) -> None:
        """Raises ConfigError where logits computed from hidden states are not the model's own: an architecture that
        changes hidden states before its output layer, or logits behind it, in a way that is not known here."""
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 2e-2
        for text in texts:
            model: Any = self.model
            ids = torch.tensor([list(text)], device=model.device)
            plain = model(input_ids=ids, use_cache=False).logits[0].float()
            off = (self.logits(self.hidden([text])[0]) - plain).abs().max() / plain.abs().max()
            if not off < tolerance:
                raise ConfigError(
                    f"model: {self.path} ({model.config.model_type}) has logits that its last hidden state does not "
                    f"give (relative difference {off:.2g}): no head can be trained on it; objective vocabulary trains "
                    "a reward model of its own"
                )

    def fingerprint(self) -> str:
        """Differs between models of other weights, whatever their paths."""
        digest = hashlib.sha256(self.model.config.to_json_string().encode())
        for name, weight in self.model.state_dict().items():
            flat = weight.flatten()
            sampled = flat[:: max(1, len(flat) // _SAMPLED)].double().cpu()
            digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
            digest.update(sampled.numpy().tobytes())
        return digest.hexdigest()


def check_tokens(base: FrozenBase, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError where the tokenizer has tokens that the base's output layer lacks."""
    if len(tokenizer) > base.output_rows.shape[0]:
        raise ConfigError(
            f"model: {base.path} has {base.output_rows.shape[0]} next-token outputs for the {len(tokenizer)} tokens of "
            "its tokenizer: a head needs one for each"
        )
