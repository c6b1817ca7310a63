"""The world's tokenizer: byte-level BPE of 1024 tokens, `<pad>` = 0 and `<eos>` = 1, nothing added to a prompt."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 1024
WINDOW = 1024

# Everyday words outside the grammar, so that a message typed by hand is not spelled out letter by letter.
EVERYDAY = """
about account address after again answer anyone because before believe better between bought bring button buy call
change charger cheaper check children choose clean close company complain contact cost could country customer
damaged date delivery different discount does during early enough every everything exchange expect explain family
feel finally following friend gift give great guess happen hear hope hour house how immediately important include
information instead kitchen know large later leave letter like little long look lost make maybe minute mistake money
month morning must never night nothing number offer often open option other package parcel pay people perhaps
person pickup place please possible post price problem product promise question quick quite reason receive receipt
remember replace request return said same screen seem sell service shipping shop should since small something soon
still store street sure talk tell than thanks there these thing think those though today together tomorrow tonight
track transfer true try under understand unhappy until urgent use useful very voucher wait warranty website week
weekend what when where which while who why window with within without wonder work world worry would year yesterday
"""

# Renders a conversation to the text the base was trained on; a system message has no place in it and is left out.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ 'Customer: ' + message['content'] + '\n' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ 'Agent: ' + message['content'] + '\n' }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Agent:' }}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=1,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, EVERYDAY.replace("\n", " ")], trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(f"the corpus yields {tokenizer.get_vocab_size()} tokens, {vocabulary} are needed")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        model_max_length=WINDOW,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
