"""What an auxiliary model's checkpoint and architecture must be like, and the refusal of those that are not."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from steersman.guidance.tokenizers import count_ids
from steersman.guidance.weight_files import find_damage
from steersman.kernels.dispatch import compile_gather, gather_outputs


class ModelRefused(ValueError):
    """An auxiliary model that would not be served correctly; the message says why and what would help."""


def find_head(model: torch.nn.Module) -> torch.nn.Module:
    """The module that maps hidden states to outputs: the only child beside the body that is not dropout."""
    heads = [
        (name, child)
        for name, child in model.named_children()
        if child is not model.base_model and not isinstance(child, torch.nn.Dropout)
    ]
    if len(heads) != 1:
        names = ", ".join(name for name, _ in heads) or "none"
        raise ModelRefused(f"{type(model).__name__} has not one output head beside its body but: {names}")
    return heads[0][1]


class LanguageHead:
    """A language model's output layer and what some architectures do to logits behind it: an OutputLayer."""

    def __init__(self, layer: Any, scale: float, cap: float | None) -> None:
        """layer: linear, weight [V, D]. Logits are multiplied by `scale`, then capped softly where there is a `cap`."""
        self._layer = layer
        self._scale = scale
        self._cap = cap

    @property
    def vocabulary(self) -> int:
        """Tokens that it has a logit for."""
        return int(self._layer.weight.shape[0])

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., D] → logits [..., V] in the layer's own precision."""
        return self._finish(self._layer(hidden))

    def every(self, features: torch.Tensor) -> torch.Tensor:
        """The same in float32."""
        return self(features.to(self._layer.weight.dtype)).float()

    def at(self, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """hidden [G, D], tokens [G, k] int64 → their logits [G, k], computed in float32."""
        bias = getattr(self._layer, "bias", None)
        return self._finish(gather_outputs(features, self._layer.weight, bias, tokens))

    def warm_up(self) -> None:
        """Compiles on a GPU what `at` launches."""
        compile_gather(self._layer.weight, getattr(self._layer, "bias", None))

    def _finish(self, logits: torch.Tensor) -> torch.Tensor:
        if self._scale != 1.0:
            logits = logits * self._scale
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)


def find_language_head(model: Any) -> LanguageHead:
    """The output layer of a causal language model; raises ModelRefused where there is not one."""
    config = model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return LanguageHead(find_head(model), scale, getattr(config, "final_logit_softcapping", None))


def find_window(config: Any) -> int:
    """Longest sequence the model was made for, in tokens."""
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx")]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=2**31)


def find_vocabulary(model: Any) -> int:
    """Token ids that a model reads: rows of its input embedding, or outputs where it has fewer next-token outputs."""
    rows: int = model.get_input_embeddings().num_embeddings
    head = model.get_output_embeddings()
    return rows if head is None else min(rows, head.out_features)


def declared_vocabulary(config: Any) -> int | None:
    """The same as a configuration declares it; None where it does not."""
    return getattr(config.get_text_config(), "vocab_size", None)


def require_vocabulary(
    label: str, path: str | Path, vocabulary: int | None, base_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuses a model that cannot read every token of the base. vocabulary: token ids that it reads, if known."""
    needed = count_ids(base_tokenizer)
    if vocabulary is not None and vocabulary < needed:
        raise ModelRefused(
            f"{label}: {path} has an embedding of {vocabulary} token ids, the base model's tokenizer needs {needed}; "
            f"use a model of the base's family, or resize this one (resize_token_embeddings({needed})) and train it"
        )


def declared_kind(config: Any) -> str | None:
    """The kind that steersman's trainers write into a checkpoint's config, if it is one of theirs."""
    return (getattr(config, "steersman", None) or {}).get("kind")


def declared_quantization(config: Any) -> str | None:
    """The method by which a checkpoint's weights are quantised, as its configuration declares it; None where they are
    not."""
    declared = getattr(config, "quantization_config", None)
    if declared is None:
        return None
    method = declared.get("quant_method") if isinstance(declared, dict) else getattr(declared, "quant_method", None)
    return "unknown method" if method is None else str(getattr(method, "value", method))


def is_causal(config: Any) -> bool:
    """Whether a model of this configuration reads a text from its start, so that what comes later changes nothing."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    encoders = {"bert", "roberta", "xlm-roberta", "electra", "camembert", "bert-generation", "roformer", "rembert"}
    bidirectional = config.model_type in encoders or getattr(config, "is_encoder_decoder", False)
    return config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not bidirectional


def require_safetensors(path: str | Path, label: str, config: str = "config.json") -> None:
    """Refuses a local checkpoint folder that has no safetensors file, or one that is not whole."""
    try:
        _require_files(Path(path), path, label, config)
    except OSError as error:
        raise ModelRefused(f"{label}: {path!s:.200} cannot be read: {error.strerror or error}") from error


def _require_files(folder: Path, path: str | Path, label: str, config: str) -> None:
    if not folder.exists():
        if str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
            raise ModelRefused(f"{label}: {path} does not exist")
        return
    if not folder.is_dir() or not (folder / config).is_file():
        raise ModelRefused(f"{label}: {path} is not a checkpoint folder ({config} is missing)")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelRefused(
            f"{label}: {path} holds no *.safetensors file; other formats can run code when they are "
            "loaded. Save it again with save_pretrained(safe_serialization=True)"
        )
    for file in files:
        if (damage := find_damage(file)) is not None:
            raise ModelRefused(f"{label}: {file} {damage}; download, copy or save it again")


def first_line(error: Exception) -> str:
    """The start of an error's message, for a sentence of ours."""
    return str(error).strip().split("\n")[0][:300]


def training_facts(config: Any) -> dict[str, Any]:
    """What steersman's trainers wrote into a checkpoint's config that users are shown."""
    objective = (getattr(config, "steersman", None) or {}).get("objective")
    return {} if objective is None else {"objective": objective}
