"""Whether two models speak of the same tokens."""

from transformers import PreTrainedTokenizerBase


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether both give every token the same id and cut text alike."""
    probe = "Hello, World! 1234 über\n  def f(x): return x"
    return one.get_vocab() == other.get_vocab() and (
        one(probe, add_special_tokens=False)["input_ids"] == other(probe, add_special_tokens=False)["input_ids"]
    )


def size_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that a tokenizer knows, added ones included."""
    return len(tokenizer.get_vocab())
