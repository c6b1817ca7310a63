"""Loading reward models, and refusing what would not be served correctly."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from steersman.guidance.aspects import ASPECTS, require_aspects, weigh_outputs
from steersman.guidance.cached import make_ready
from steersman.guidance.checkpoints import (
    ModelRefused,
    declared_kind,
    declared_vocabulary,
    find_vocabulary,
    first_line,
    is_causal,
    require_safetensors,
    require_vocabulary,
)
from steersman.guidance.head_files import REWARD, HeadCheckpoint, is_head
from steersman.guidance.head_models import HeadReward, ServedBase, read_head_checkpoint
from steersman.guidance.rewards import CausalReward, RewardModel, VocabularyReward
from steersman.guidance.text_form import TextForm, choose_form
from steersman.guidance.text_reward import TextReward
from steersman.guidance.tokenizers import same_tokenizer, size_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardCheckpoint:
    """A reward model as it was read, on the host."""

    kind: str
    model: Any
    tokenizer: PreTrainedTokenizerBase | None
    """Its own, where it is scored from text."""
    form: TextForm | None = None
    """How it reads a conversation, where it is scored from text."""


def load_reward_model(
    name: str,
    path: str,
    base_tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cache_bytes: int = 256 * 2**20,
    max_rows: int = 64,
    trust_remote_code: bool = False,
    template: str | None = None,
    served: ServedBase | None = None,
) -> RewardModel | HeadReward:
    """Loads a checkpoint from a folder or the hub and picks its path: over a cache when it is causal and shares the
    base's tokenizer, with a vocabulary head when it says that it has one, else from text.

    max_rows: rows that one forward is laid out for; more are scored in several. template: how a model that is scored
    from text reads its input, see `choose_form`. served: the base model, which the head of another one does not fit.

    Raises ModelRefused with the reason and the way out. Only safetensors are read.
    """
    checkpoint = read_reward_checkpoint(name, path, base_tokenizer, dtype, trust_remote_code, template, served)
    model = build_reward_model(name, checkpoint, base_tokenizer, device, cache_bytes, max_rows, served)
    make_ready(model)
    return model


def load_scorer(name: str, path: str, base_tokenizer: PreTrainedTokenizerBase, **options: Any) -> RewardModel:
    """As `load_reward_model`, for a reward model that scores texts by itself: raises ModelRefused for a head."""
    model = load_reward_model(name, path, base_tokenizer, **options)
    if isinstance(model, HeadReward):
        raise ModelRefused(
            f"reward model {name!r}: {path} is a head, which scores nothing without its base model; use a reward model "
            "of its own"
        )
    return model


def read_reward_checkpoint(
    name: str,
    path: str,
    base_tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    template: str | None = None,
    served: ServedBase | None = None,
) -> RewardCheckpoint:
    """The part of loading that needs no device; raises as `load_reward_model` does."""
    if is_head(path):
        return RewardCheckpoint(HeadReward.kind, _read_head(name, path, base_tokenizer, template, served), None)
    config, tokenizer, kind = inspect_checkpoint(name, path, base_tokenizer, trust_remote_code, template)
    family = AutoModelForCausalLM if kind == VocabularyReward.kind else AutoModelForSequenceClassification
    try:
        model, report = family.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    # What a quantised checkpoint needs may not be installed.
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelRefused(f"reward model {name!r}: {path} cannot be loaded: {first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelRefused(f"reward model {name!r}: {path} lacks the weights {', '.join(missing[:3])}")
    if kind != TextReward.kind:
        require_vocabulary(f"reward model {name!r}", path, find_vocabulary(model), base_tokenizer)
    if declared_kind(config) == ASPECTS:
        weigh_outputs(model)
        if config.steersman.get("aspects_at") == "segments":
            logger.warning(
                "reward model %r learned at the ends of segments only: it scores answers, but what it says within a "
                "sentence is arbitrary, and steers badly; train it with aspects_at: tokens",
                name,
            )
    if kind != TextReward.kind:
        return RewardCheckpoint(kind, model, None)
    return RewardCheckpoint(kind, model, tokenizer, choose_form(name, config, tokenizer, template))


def build_reward_model(
    name: str,
    checkpoint: RewardCheckpoint,
    base_tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str,
    cache_bytes: int,
    max_rows: int,
    served: ServedBase | None = None,
) -> RewardModel | HeadReward:
    """A reward model on its device, not captured and not checked yet; raises ModelRefused."""
    if checkpoint.kind == HeadReward.kind:
        return HeadReward(checkpoint.model, name, device, served)
    model = checkpoint.model.to(device)
    if checkpoint.kind == CausalReward.kind:
        return CausalReward(model, name, cache_bytes, max_rows)
    if checkpoint.kind == VocabularyReward.kind:
        return VocabularyReward(model, name, cache_bytes, max_rows)
    logger.warning(
        "reward model %r (%s) does not share the base model's tokenizer or is not causal: it is scored from text, "
        "which reads the whole answer again for every candidate and is much slower",
        name,
        model.config.model_type,
    )
    assert checkpoint.tokenizer is not None
    assert checkpoint.form is not None
    return TextReward(model, name, checkpoint.tokenizer, checkpoint.form, decode=_text_decoder(base_tokenizer))


def inspect_reward_model(
    name: str,
    path: str,
    base_tokenizer: PreTrainedTokenizerBase,
    trust_remote_code: bool = False,
    template: str | None = None,
) -> None:
    """Raises ModelRefused for a checkpoint that cannot be served, as far as it shows without loading a model."""
    if is_head(path):
        _read_head(name, path, base_tokenizer, template, None)
    else:
        inspect_checkpoint(name, path, base_tokenizer, trust_remote_code, template)


def inspect_checkpoint(
    name: str,
    path: str,
    base_tokenizer: PreTrainedTokenizerBase,
    trust_remote_code: bool = False,
    template: str | None = None,
) -> tuple[Any, PreTrainedTokenizerBase, str]:
    """Everything that can be said of a checkpoint without its weights: config, tokenizer, kind of reward model.

    Raises ModelRefused for what cannot be served.
    """
    require_safetensors(path, f"reward model {name!r}")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelRefused(f"reward model {name!r}: {path} cannot be read: {first_line(error)}") from error
    kind = declared_kind(config)
    if kind == VocabularyReward.kind:
        _require_vocabulary_head(name, path, config)
    else:
        _require_reward_head(name, path, config)
    shared = same_tokenizer(tokenizer, base_tokenizer)
    if kind in ("reward", ASPECTS, VocabularyReward.kind) and not shared:
        raise ModelRefused(
            f"reward model {name!r}: {path} was trained on another tokenizer than the base model's "
            f"({size_of(tokenizer)} against {size_of(base_tokenizer)} tokens); train it from a checkpoint that has it"
        )
    if kind != VocabularyReward.kind:
        kind = CausalReward.kind if shared and is_causal(config) else TextReward.kind
    if kind != TextReward.kind:
        require_vocabulary(f"reward model {name!r}", path, declared_vocabulary(config), base_tokenizer)
        _refuse_template(name, template)
    else:
        choose_form(name, config, tokenizer, template)
    return config, tokenizer, kind


def _read_head(
    name: str,
    path: str,
    base_tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    served: ServedBase | None,
) -> HeadCheckpoint:
    _refuse_template(name, template)
    return read_head_checkpoint(f"reward model {name!r}", path, REWARD, base_tokenizer, served)


def _refuse_template(name: str, template: str | None) -> None:
    if template is not None:
        raise ModelRefused(
            f"--reward-template {name}: this model reads the base's own tokens, with the base's chat template; "
            "leave the flag out"
        )


def _require_reward_head(name: str, path: str | Path, config: Any) -> None:
    architectures = getattr(config, "architectures", None) or []
    if not any("SequenceClassification" in architecture for architecture in architectures):
        raise ModelRefused(
            f"reward model {name!r}: {path} is a {', '.join(architectures) or 'model without an architecture'}, not a "
            "sequence classifier; a reward model has one score for a text (…ForSequenceClassification)"
        )
    if declared_kind(config) == ASPECTS:
        if not is_causal(config):
            raise ModelRefused(
                f"reward model {name!r}: {path} scores aspects but is not causal ({config.model_type}); train it from "
                "a causal language model"
            )
        require_aspects(path, f"reward model {name!r}", config)
    elif config.num_labels != 1:
        raise ModelRefused(f"reward model {name!r}: {path} has {config.num_labels} outputs; a reward model has one")


def _require_vocabulary_head(name: str, path: str | Path, config: Any) -> None:
    architectures = getattr(config, "architectures", None) or []
    if not any(architecture.endswith("ForCausalLM") for architecture in architectures) or not is_causal(config):
        raise ModelRefused(
            f"reward model {name!r}: {path} says that it has a vocabulary head but is a "
            f"{', '.join(architectures) or 'model without an architecture'}; it needs one output a token (…ForCausalLM)"
        )


def _text_decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], str]:
    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return decode
