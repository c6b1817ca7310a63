"""Whether two models have the same tokens, and whether a model can read a token id."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from steersman.guidance.request import UnreadableToken

POLICY_KINDS = ("policy", "policy_head")
"""Kinds of auxiliary models that are policies; all others are reward models."""


class TokenReader(Protocol):
    """An auxiliary model, or its description."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def vocabulary(self) -> int | None:
        """Token ids below this number can be read; None where the model reads text."""
        ...


def same_tokenizer(model: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase) -> bool:
    """Whether a model's tokenizer gives every token of the base's the same id and cuts text alike. Tokens that the
    model alone has added, a padding token for example, change neither."""
    probe = "Hello, World! 1234 über\n  def f(x): return x"
    known, needed = model.get_vocab(), base.get_vocab()
    return (
        known.keys() - needed.keys() <= model.get_added_vocab().keys()
        and all(known.get(token) == number for token, number in needed.items())
        and model(probe, add_special_tokens=False)["input_ids"] == base(probe, add_special_tokens=False)["input_ids"]
    )


def size_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that a tokenizer knows, added ones included."""
    return len(tokenizer.get_vocab())


def count_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs for a tokenizer: its largest id + 1, for ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def find_unreadable(tokens: Sequence[int], vocabulary: int) -> int | None:
    """A token outside of 0 to `vocabulary` - 1, if there is one."""
    extremes = (max(tokens), min(tokens)) if tokens else ()
    return next((token for token in extremes if not 0 <= token < vocabulary), None)


def check_ids(models: Iterable[TokenReader], tokens: Sequence[int], field: str) -> None:
    """Raises UnreadableToken on `field` where one of the models cannot read one of the tokens."""
    for model in models:
        if model.vocabulary is None:
            continue
        if (token := find_unreadable(tokens, model.vocabulary)) is not None:
            raise UnreadableToken(
                field,
                f"holds token {token}, {name_model(model)} reads the ids 0 to {model.vocabulary - 1}; leave the token "
                "out or use a model with as large a vocabulary as the base's",
            )


def name_model(model: TokenReader) -> str:
    """How errors call a model."""
    return f"{'policy' if model.kind in POLICY_KINDS else 'reward model'} {model.name!r}"
