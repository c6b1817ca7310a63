"""The one place that writes a prompt and an unfinished answer in the form that a text reward model was trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from steersman.guidance.checkpoints import ModelRefused, declared_kind, first_line, is_causal

RAW, PAIR, CHAT = "raw", "pair", "chat"
"""Forms: the conversation's text with the answer behind it; both as two segments; a chat template."""

_PROBE = [{"role": "user", "content": "Hello?"}]


@dataclass(frozen=True)
class Source:
    """What a prompt's token ids were made of: a chat's messages, or a text."""

    messages: tuple[Mapping[str, Any], ...] | None = None
    text: str | None = None
    begun: str = ""
    """The beginning of the answer, where a chat's last message is continued."""

    @property
    def characters(self) -> int:
        """How long its text is."""
        contents = (str(message.get("content") or "") for message in self.messages or ())
        return len(self.text or "") + len(self.begun) + sum(map(len, contents))

    @property
    def is_one_question(self) -> bool:
        """Whether a chat consists of one user message, whose text can be the first of two segments."""
        return self.messages is not None and [m["role"] for m in self.messages] == ["user"]


@dataclass(frozen=True)
class TextForm:
    """How one reward model reads a prompt with an answer."""

    kind: str
    chosen: bool
    """By --reward-template, or by the tokenizer's own chat template; otherwise it is inferred from the architecture."""
    template: str | None = None
    """A chat template that replaces the tokenizer's."""

    @property
    def chat(self) -> str:
        """Which chats it takes: "all", "one question" or "none"."""
        if self.chosen:
            return "all"
        return "one question" if self.kind == PAIR else "none"

    def write(
        self, tokenizer: PreTrainedTokenizerBase, source: Source | None, prompt: str, answer: str
    ) -> dict[str, Any]:
        """Arguments of `tokenizer` for a prompt and an unfinished answer.

        prompt: the prompt's text, used where `source` does not have it. A chat template ends where the answer does,
        without the marks that close a turn. Raises ValueError where the messages do not fit the chat template.
        """
        if source is not None and source.messages is not None:
            answer = source.begun + answer
            if self.kind == CHAT:
                text = self._continue_chat(tokenizer, source.messages, answer)
                return {"text": text, "add_special_tokens": False}
            prompt = join_messages(source.messages)
            if self.kind == RAW:
                prompt += "\nassistant: "
        elif source is not None and source.text is not None:
            prompt = source.text
        if self.kind == PAIR:
            return {"text": prompt, "text_pair": answer, "add_special_tokens": True}
        return {"text": prompt + answer, "add_special_tokens": True}

    def _continue_chat(
        self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], answer: str
    ) -> str:
        chat = [*map(dict, messages), {"role": "assistant", "content": answer}]
        try:
            return str(
                tokenizer.apply_chat_template(
                    chat, chat_template=self.template, tokenize=False, continue_final_message=True
                )
            )
        except Exception as error:
            raise ValueError(f"the messages do not fit its chat template: {first_line(error)}") from error


def join_messages(messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation as text for a model without a chat template: one message's content as it is, several as lines
    "role: content"."""
    if len(messages) == 1:
        return str(messages[0].get("content") or "")
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in messages)


def choose_form(name: str, config: Any, tokenizer: PreTrainedTokenizerBase, template: str | None) -> TextForm:
    """The form of a text model; raises ModelRefused for a chat template that cannot be rendered.

    template: RAW, PAIR, or the source of a Jinja template, as the user chose; None where the user did not.
    """
    if template in (RAW, PAIR):
        return TextForm(template, True)
    if template is not None or getattr(tokenizer, "chat_template", None):
        form = TextForm(CHAT, True, template)
        try:
            form.write(tokenizer, Source(tuple(_PROBE)), "", "Hi")
        except ValueError as error:
            raise ModelRefused(
                f"reward model {name!r}: {error}; choose the form of its input by --reward-template {name}=raw, pair "
                "or a Jinja file"
            ) from error
        return form
    return TextForm(RAW if is_causal(config) or declared_kind(config) is not None else PAIR, False)
