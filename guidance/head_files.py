"""A head's checkpoint: one safetensors file of weights, facts, and the probe by which a server tells its base again.

The probe holds a few texts as token ids and the hidden states that the base had at their ends when the head was
trained. Whether the model that is served is that base, how far quantisation or another precision has moved it, and
whether a server hands the right rows of hidden states to the head, all show in them.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from steersman.guidance.checkpoints import ModelRefused
from steersman.guidance.heads import Head, build_head
from steersman.guidance.weight_files import find_damage

HEAD_FILE = "head.safetensors"
REWARD, POLICY = "reward", "policy"
"""What a head's outputs are: rewards r(s·v), or what a policy adds to log π₀(v | s)."""

_METADATA = "steersman"
_PADDING = -1
_FORMAT = 1


@dataclass(frozen=True)
class BaseFacts:
    """The base model that a head was trained on."""

    model_type: str
    hidden_size: int
    layers: int
    vocabulary: int
    """Rows of its output layer."""


@dataclass(frozen=True)
class Probe:
    """Texts and the base's hidden states at their ends."""

    texts: list[list[int]]
    hidden: torch.Tensor
    """[texts, D] float32, as the base's output layer takes them."""


@dataclass(frozen=True)
class HeadCheckpoint:
    """A head as its file holds it."""

    head: Head
    role: str
    """REWARD or POLICY."""
    base: BaseFacts
    probe: Probe
    facts: dict[str, Any]
    """What its trainer wrote: objective, accuracy by prefix length, the β where validation reward peaks."""


def is_head(path: str | Path) -> bool:
    """Whether a local folder holds a head."""
    try:
        return (Path(path) / HEAD_FILE).is_file()
    except OSError:  # a path that the file system does not take
        return False


def save_head(folder: str | Path, checkpoint: HeadCheckpoint) -> None:
    """Writes the checkpoint into a folder that exists."""
    longest = max(map(len, checkpoint.probe.texts))
    texts = [[*text, *[_PADDING] * (longest - len(text))] for text in checkpoint.probe.texts]
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in checkpoint.head.state_dict().items()}
    tensors["probe.texts"] = torch.tensor(texts, dtype=torch.int32)
    tensors["probe.hidden"] = checkpoint.probe.hidden.float().contiguous().cpu()
    facts = {"format": _FORMAT, "role": checkpoint.role, "base": asdict(checkpoint.base), "facts": checkpoint.facts}
    # safetensors' own `save_file` lets the file's owner alone read it, whatever the umask.
    (Path(folder) / HEAD_FILE).write_bytes(save(tensors, {_METADATA: json.dumps(facts)}))


def read_head(label: str, path: str | Path, role: str) -> HeadCheckpoint:
    """The head in a local folder; raises ModelRefused with the reason and the way out.

    label: how errors name the model, such as "reward model 'helpful'". role: what it is loaded as.
    """
    file = Path(path) / HEAD_FILE
    if (damage := find_damage(file)) is not None:
        raise ModelRefused(f"{label}: {file} {damage}; download, copy or save it again")
    try:
        with safe_open(file, "pt") as opened:
            metadata = json.loads((opened.metadata() or {}).get(_METADATA, "null"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no iterator)
        checkpoint = _build(metadata, tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelRefused(
            f"{label}: {file} is not a head of steersman's trainers ({error}); train one with "
            "steersman train reward --objective head or steersman train dpo --head"
        ) from error
    if checkpoint.role != role:
        option = "--reward-model" if checkpoint.role == REWARD else "--policy"
        raise ModelRefused(f"{label}: {path} is the head of a {_name_role(checkpoint.role)}; load it with {option}")
    return checkpoint


def base_facts(config: Any, vocabulary: int) -> BaseFacts:
    """From a model's configuration and the rows of its output layer."""
    text = config.get_text_config()
    return BaseFacts(config.model_type, text.hidden_size, text.num_hidden_layers, vocabulary)


def _build(metadata: Any, tensors: dict[str, torch.Tensor]) -> HeadCheckpoint:
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise ValueError(f"its metadata lack format {_FORMAT}")
    spoilt = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if spoilt:
        raise ValueError(f"{spoilt[0]} holds numbers that are not finite")
    texts, hidden = tensors.pop("probe.texts"), tensors.pop("probe.hidden")
    base, head = BaseFacts(**metadata["base"]), build_head(tensors)
    shape = head.shape
    known = (texts >= _PADDING) & (texts < shape.vocabulary)
    if texts.dim() != 2 or hidden.shape != (len(texts), shape.hidden_size) or not known.all():
        raise ValueError("its probe does not fit its weights")
    probe = Probe([_strip(text) for text in texts.tolist()], hidden)
    if not probe.texts or not all(probe.texts):
        raise ValueError("its probe is empty, or a text of it")
    if (shape.hidden_size, shape.vocabulary) != (base.hidden_size, base.vocabulary):
        raise ValueError("its weights do not fit the base that it names")
    if metadata["role"] not in (REWARD, POLICY):
        raise ValueError(f"its role is {metadata['role']!r}")
    return HeadCheckpoint(head, metadata["role"], base, probe, metadata["facts"])


def _strip(text: Sequence[int]) -> list[int]:
    return [token for token in text if token != _PADDING]


def _name_role(role: str) -> str:
    return "reward model" if role == REWARD else "policy"
