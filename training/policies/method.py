"""One method of `steersman train dpo`: what of its training differs from the others'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from steersman.training.data.preferences import TokenizedPreference


@dataclass(frozen=True)
class Method:
    """The steps in which one method differs. A configuration is TRL's, or made from it."""

    config: type[Any]
    make_trainer: Callable[
        [Any, PreTrainedModel, PreTrainedTokenizerBase, Sequence[TokenizedPreference], LoraConfig | None], Trainer
    ]
    """From a configuration, what is trained, and the rows in the order in which they are to be read, if it is fixed."""
    describe: Callable[[Any], dict[str, Any]]
    """Facts for config.json: the loss, and the settings that belong to it."""
    check: Callable[[Any], None] = lambda _: None
    """Raises ConfigError for a configuration that this method can't be run with."""
    aspects: Callable[[Any], Sequence[str]] = lambda _: ()
    """Those that segments must be scored by."""
    in_order: bool = False
    """Whether its trainer reads rows in their order, so that they must be shuffled beforehand."""
