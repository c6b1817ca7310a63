"""What `steersman evaluate` reads: YAML settings and JSONL prompts, checked before anything is asked."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from steersman.benchmarks.common.demo import read_prompts
from steersman.guidance.request import GuidanceError, parse_guidance, policies, reward_models
from steersman.training.world import gold

SAMPLING_FIELDS = (
    *("temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "bad_words"),
)
_NEUTRAL = {
    **{"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "presence_penalty": 0, "frequency_penalty": 0},
    **{"repetition_penalty": 1, "logit_bias": None, "bad_words": None},
}


class SettingsError(ValueError):
    """A file or flag that cannot be evaluated; the message is one line that names the field."""


@dataclass(frozen=True)
class Setting:
    """One way of decoding: guidance, or None for the base alone, and fields of the request beside it."""

    name: str
    guidance: dict[str, Any] | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def plainly_sampled(self) -> bool:
        """Whether tokens are drawn from the guided distribution itself: at temperature 1, nothing cut or penalised."""
        return all(self.fields.get(name, neutral) == neutral for name, neutral in _NEUTRAL.items())

    def steered(self, **changes: Any) -> "Setting":
        """The same with other fields of its guidance."""
        return replace(self, guidance={**(self.guidance or {}), **changes})


@dataclass(frozen=True)
class Prompt:
    """A text, or the messages of a chat; `world` is the demo world's text of it, None for prompts of elsewhere."""

    text: str | None
    messages: tuple[dict[str, Any], ...] = ()
    world: str | None = None

    @property
    def body(self) -> dict[str, Any]:
        """Its field of a request."""
        return {"prompt": self.text} if self.text is not None else {"messages": list(self.messages)}


def read_settings(path: Path) -> list[Setting]:
    """The settings of a YAML file, name → {guidance: {…} or null, any sampling field}; raises SettingsError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping) or not content:
        raise SettingsError(f"{path}: give a mapping of names to settings such as {{guidance: {{method: pargs, …}}}}")
    return [_parse_setting(path, name, value) for name, value in content.items()]


def _parse_setting(path: Path, name: Any, value: Any) -> Setting:
    label = f"{path}: {name}"
    if not isinstance(name, str) or not isinstance(value, Mapping | None):
        raise SettingsError(
            f"{label}: must be a name with an object of guidance and sampling fields, got {value!r:.80}"
        )
    fields = dict(value or {})
    guidance = fields.pop("guidance", None)
    if unknown := [key for key in fields if key not in SAMPLING_FIELDS]:
        known = ", ".join(sorted(SAMPLING_FIELDS))
        raise SettingsError(f"{label}.{unknown[0]}: is not a known field; known fields are guidance, {known}")
    if guidance is not None:
        try:
            parse_guidance(guidance)
        except GuidanceError as error:
            raise SettingsError(f"{label}.{error}") from None
    return Setting(name, guidance, fields)


def check_models(settings: Sequence[Setting], judge: str | None, rewards: Sequence[str], loaded: Sequence[str]) -> None:
    """Raises SettingsError for models that the server has not loaded and for settings that decode with the judge.

    rewards and loaded: the reward models and policies of the server.
    """
    if judge is not None and judge not in rewards:
        raise SettingsError(f"--judge: no reward model {judge!r} is loaded; loaded are: {', '.join(rewards) or 'none'}")
    for setting in settings:
        if setting.guidance is None:
            continue
        guidance = parse_guidance(setting.guidance)
        for what, named, known in (
            ("reward model", reward_models(guidance), rewards),
            ("policy", policies(guidance), loaded),
        ):
            for place, name in named:
                if name not in known:
                    there = ", ".join(known) or "none"
                    raise SettingsError(f"{setting.name}.{place}: no {what} {name!r} is loaded; loaded are: {there}")
                if name == judge:
                    raise SettingsError(
                        f"{setting.name}.{place}: {name!r} is the judge; what a reward model steers, it can't judge: "
                        "choose another --judge"
                    )


def read_prompt_file(path: Path) -> list[Prompt]:
    """The prompts of a JSONL file with `prompt` or `messages` in every row; raises SettingsError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {' '.join(str(error).split())}") from None
    prompts = [_parse_prompt(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise SettingsError(f"{path}: no prompts")
    return prompts


def world_prompts(split: str) -> list[Prompt]:
    """The demo world's `tuning` or `reporting` prompts; the two are disjoint."""
    return [Prompt(text, world=text) for text in read_prompts(split)]


def _parse_prompt(where: str, line: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{where}: not JSON: {error}") from None
    text, messages = (row.get("prompt"), row.get("messages")) if isinstance(row, dict) else (None, None)
    if isinstance(text, str) and text:
        return Prompt(text, world=_world_text(text))
    if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
        return Prompt(None, tuple(messages), _world_text(_transcript(messages)))
    raise SettingsError(f"{where}: give prompt, a text, or messages, a list of chat messages")


def _transcript(messages: Sequence[Mapping[str, Any]]) -> str:
    """The last message as the demo world's chat template writes it."""
    return f"Customer: {messages[-1].get('content')}\nAgent:"


def _world_text(text: str) -> str | None:
    """The text, where it is a customer's message whose gold reward the demo world's rules can tell."""
    known = "Customer:" in text and gold.read_issue(text) is not None and gold.read_item(text) is not None
    return text if known else None
