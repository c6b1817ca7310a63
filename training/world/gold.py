"""The gold reward: five aspects read from the text by rules. Reward models see labels drawn from it, no rule."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import cache

from steersman.training.world.grammar import FILLER, ITEMS, PROBLEMS, REMEDIES, all_sentences, pattern

MAXIMUM = 3.5

_POLITE = ("sorry", "happy to help", "thank you", "always welcome", "if you need anything else")
_RUDE = (
    "tired of messages",
    "do not know how",
    "better things to do",
    "only yourself to blame",
    "wasting my time",
    "will break the next",
    "cheap",
    "do not write to me",
    "learn to read",
    "Hello again",
)
_ARRANGED = re.compile(rf"\barranged the ({'|'.join(REMEDIES)}) for\b")
_SENTENCE = re.compile(r"[^.?!]*[.?!]|[^.?!]+$")


@dataclass(frozen=True)
class Gold:
    """One response's aspects."""

    helpful: float  # 1.5 the remedy for the customer's issue, -1 another, else 0
    attentive: float  # .5 names the customer's item, -.5 names another, else 0
    polite: float  # .25 for each kind word, at most .5
    respect: float  # .5, less 1 for each rude phrase, at least -2
    clear: float  # .5, less .5 for each filler, repeated, ungrammatical or unfinished sentence, at least -1

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class SentenceGold:
    """One sentence, `response[start:end]`, and what it alone adds to each aspect."""

    start: int
    end: int
    gold: Gold


def score(prompt: str, response: str) -> Gold:
    """The gold reward of a response to the last customer message in `prompt`."""
    return _total([sentence.gold for sentence in score_sentences(prompt, response)])


def score_sentences(prompt: str, response: str) -> list[SentenceGold]:
    """What each sentence adds; `score` is their sum within each aspect's bounds."""
    issue, item = read_issue(prompt), read_item(prompt)
    scored: list[SentenceGold] = []
    seen: set[str] = set()
    for match in _SENTENCE.finditer(response):
        sentence = match.group().strip()
        if not sentence:
            continue
        scored.append(SentenceGold(match.start(), match.end(), _sentence(sentence, issue, item, sentence in seen)))
        seen.add(sentence)
    return scored


def read_item(text: str) -> str | None:
    """The item that the last customer message in the text names first."""
    return next(iter(items_in(_last_message(text))), None)


def read_issue(text: str) -> str | None:
    """The issue that the last customer message in the text is about."""
    message = _last_message(text)
    return next((issue for issue, phrases in _problems().items() if any(p.search(message) for p in phrases)), None)


def items_in(text: str) -> list[str]:
    """The items a text names, in order."""
    return re.findall(rf"\b(?:{'|'.join(ITEMS)})\b", text)


def _sentence(sentence: str, issue: str | None, item: str | None, repeated: bool) -> Gold:
    arranged = _ARRANGED.findall(sentence)
    named = items_in(sentence)
    unclear = repeated or sentence in FILLER or not _grammatical().fullmatch(sentence)
    return Gold(
        helpful=0.0 if not arranged else 1.5 if arranged == [issue] else -1.0,
        attentive=0.0 if not named else 0.5 if all(name == item for name in named) else -0.5,
        polite=0.25 * sum(phrase in sentence for phrase in _POLITE),
        respect=-1.0 * sum(phrase in sentence for phrase in _RUDE),
        clear=-0.5 * unclear,
    )


def _total(sentences: list[Gold]) -> Gold:
    helpful = [gold.helpful for gold in sentences]
    attentive = [gold.attentive for gold in sentences]
    return Gold(
        # One wrong remedy, or one wrong item, spoils the right ones beside it.
        helpful=min(helpful) if any(value < 0 for value in helpful) else max(helpful, default=0.0),
        attentive=min(attentive) if any(value < 0 for value in attentive) else max(attentive, default=0.0),
        polite=min(0.5, sum(gold.polite for gold in sentences)),
        respect=max(-2.0, 0.5 + sum(gold.respect for gold in sentences)),
        clear=max(-1.0, 0.5 + sum(gold.clear for gold in sentences)) if sentences else -1.0,
    )


def _last_message(text: str) -> str:
    return text.rpartition("Customer:")[2].partition("\nAgent:")[0]


@cache
def _problems() -> dict[str, list[re.Pattern[str]]]:
    return {issue: [re.compile(pattern(phrase)) for phrase in phrases] for issue, phrases in PROBLEMS.items()}


@cache
def _grammatical() -> re.Pattern[str]:
    return re.compile("|".join(pattern(template) for template in all_sentences()))
