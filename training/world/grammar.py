"""The help desk: who writes, what about, and the sentences an agent answers with.

An agent has hidden traits: a tone, knowledge of the right remedy, attention to the item, a habit of filler. They show
only in the sentences, and sentences of different traits open with the same few words, so that the first words of a
sentence rarely give its writer away and a sampler restricted to the likeliest tokens still meets every kind of agent.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Tone = Literal["warm", "neutral", "curt", "rude"]
Knowledge = Literal["right", "vague", "wrong", "none"]
Split = Literal["base", "reward", "evaluation", "validation", "test", "tuning", "reporting"]

ITEMS = (
    "kettle", "lamp", "radio", "toaster", "camera", "printer", "phone", "watch",
    "heater", "mixer", "clock", "speaker", "keyboard", "blender", "drill", "tent",
)  # fmt: skip
NAMES = (
    "David", "Maria", "Peter", "Anna", "Omar", "Julia", "Kenji", "Lucy",
    "Ivan", "Sara", "Tom", "Nina", "Paul", "Rosa", "Hugo", "Emma",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

GREETINGS = ("Hello", "Hi", "Good morning")
QUESTIONS = ("Can you help me?", "What can you do?", "Please help.", "Could you look into this?")

# What the customer writes about: the remedy that suits the issue → how customers put it.
PROBLEMS: dict[str, tuple[str, ...]] = {
    "delivery": (
        "the delivery of my {item} is late",
        "I am still waiting for the delivery of the {item}",
        "nobody told me about the delivery of my {item}",
    ),
    "part": (
        "a part of my {item} is broken",
        "there is a part missing in the box of the {item}",
        "my {item} came with a bad part",
    ),
    "refund": (
        "the refund for my {item} is missing",
        "I returned the {item} but got no refund",
        "I want a refund for my {item}",
    ),
    "exchange": (
        "I need an exchange of my {item}",
        "you sent the wrong {item} and I want an exchange",
        "my {item} has the wrong colour, is there an exchange",
    ),
    "invoice": (
        "I never got an invoice for my {item}",
        "the invoice for the {item} is wrong",
        "I need a new invoice for my {item}",
    ),
    "manual": (
        "there is no manual with my {item}",
        "I can not find the manual of my {item}",
        "the manual of the {item} is in another language",
    ),
    "repair": (
        "my {item} does not turn on and needs a repair",
        "I want a repair of my {item}",
        "the repair of my {item} did not help",
    ),
    "pickup": (
        "nobody came for the pickup of my {item}",
        "I do not need the {item} and want a pickup",
        "the pickup of the {item} was late",
    ),
}
# An agent who does not know arranges another issue's remedy, or what never helps.
NO_REMEDY = "voucher"
REMEDIES = (*PROBLEMS, NO_REMEDY)
FIXES = (
    "As a next step, I have arranged the {remedy} for the {item}.",
    "For now, I have arranged the {remedy} for you.",
)
VAGUE = (
    "As a next step, I have passed the matter on to someone.",
    "For now, I have put the {item} on a list.",
)
FILLER = (
    "Well, there are many things one could say.",
    "Well, things are what they are.",
    "Well, as I said, that is how it goes.",
)
OPENINGS: dict[Tone, tuple[str, ...]] = {
    "warm": ("Hello {name}.",),
    "neutral": ("Hello {name}.",),
    "curt": ("Hello {name}.", "Hello."),
    "rude": ("Hello {name}.", "Hello.", "Hello again {name}."),
}
ACKNOWLEDGEMENTS: dict[Tone, tuple[str, ...]] = {
    "warm": (
        "I am sorry about the trouble with your {item}.",
        "I am happy to help you with your {item}.",
        "I can see how annoying this is, and I am sorry about the {item}.",
    ),
    "neutral": (
        "I have read your message about the {item}.",
        "I am looking at the order for your {item}.",
        "I can see the order for your {item} here.",
    ),
    "curt": ("I have your message about the {item}.", "I can see it is about the {item}.", "I am on it."),
    "rude": (
        "I am tired of messages about the {item}.",
        "I can see you do not know how a {item} works.",
        "I have better things to do than talk about your {item}.",
    ),
}
EXTRAS: dict[Tone, tuple[str, ...]] = {
    "warm": (
        "You have been very patient, and I thank you for that.",
        "You will not have to do anything else, and I thank you for your time.",
        "You are always welcome here, {name}.",
    ),
    "neutral": (
        "You will get an email about the {item} by {day}.",
        "You can follow the {item} on our page.",
        "You have a guarantee of two years on the {item}.",
    ),
    "curt": ("You will have to wait.", "You can read the rest on our page.", "You have all you need."),
    "rude": (
        "You have only yourself to blame.",
        "You are wasting my time, {name}.",
        "You will break the next {item} too.",
        "You can not expect much from a cheap {item}.",
    ),
}
CLOSINGS: dict[Tone, tuple[str, ...]] = {
    "warm": ("Please write to me if you need anything else, {name}.", "Please let us know, we are happy to help."),
    "neutral": (
        "Please reply to this message if the {item} is still a problem.",
        "Please keep the number of the order.",
    ),
    "curt": ("Please check our page first next time.", "Please wait."),
    "rude": ("Please do not write to me again, {name}.", "Please learn to read next time."),
}

SLOTS = {"item": ITEMS, "name": NAMES, "day": DAYS, "remedy": REMEDIES}
SPLITS: dict[Split, range] = {
    "base": range(0, 58),
    "reward": range(58, 74),
    "evaluation": range(74, 86),
    "validation": range(86, 88),
    "test": range(88, 91),
    "tuning": range(91, 94),
    "reporting": range(94, 100),
}


@dataclass(frozen=True)
class Prompt:
    """A customer's message and what it is about."""

    message: str
    item: str
    issue: str
    name: str

    @property
    def text(self) -> str:
        """The text a completion starts from; the chat template renders `message` to exactly this."""
        return f"Customer: {self.message}\nAgent:"


@dataclass(frozen=True)
class Agent:
    """The hidden traits of the writer of one response."""

    tone: Tone
    knowledge: Knowledge
    attentive: bool
    filler: float


def in_split(prompt: Prompt, split: Split) -> bool:
    """Whether the prompt belongs to `split`: a hash of its text decides, so no prompt is in two splits."""
    return zlib.crc32(prompt.text.encode()) % 100 in SPLITS[split]


def draw_prompt(rng: random.Random) -> Prompt:
    item, name, issue = rng.choice(ITEMS), rng.choice(NAMES), rng.choice(tuple(PROBLEMS))
    problem = rng.choice(PROBLEMS[issue]).format(item=item)
    parts = [f"{rng.choice(GREETINGS)}, {problem}."]
    if rng.random() < 0.5:
        parts.append(f"I bought it on {rng.choice(DAYS)}.")
    parts += [rng.choice(QUESTIONS), name]
    return Prompt(" ".join(parts), item, issue, name)


def draw_prompts(split: Split, count: int, seed: int = 0) -> list[Prompt]:
    """`count` different prompts of one split."""
    rng = random.Random(f"{split}/{seed}")
    chosen: dict[str, Prompt] = {}
    while len(chosen) < count:
        prompt = draw_prompt(rng)
        if in_split(prompt, split):
            chosen.setdefault(prompt.text, prompt)
    return list(chosen.values())


def draw_agent(rng: random.Random) -> Agent:
    tone: Tone = rng.choices(("warm", "neutral", "curt", "rude"), (0.16, 0.26, 0.28, 0.30))[0]
    knowledge: Knowledge = rng.choices(("right", "vague", "wrong", "none"), (0.28, 0.18, 0.18, 0.36))[0]
    return Agent(tone, knowledge, rng.random() < 0.93, 0.4 if rng.random() < 0.3 else 0.02)


def draw_response(prompt: Prompt, rng: random.Random) -> str:
    """One agent's answer, starting with a space. At each sentence the tone changes with probability .1."""
    agent = draw_agent(rng)
    item = prompt.item if agent.attentive else rng.choice([other for other in ITEMS if other != prompt.item])
    fixes = VAGUE if agent.knowledge == "vague" else FIXES
    tables = [OPENINGS, ACKNOWLEDGEMENTS, None, *[EXTRAS] * rng.choice((0, 1, 1, 2)), CLOSINGS]
    if rng.random() < 0.15:
        tables.pop()
    tone = agent.tone
    templates: list[str] = []
    for table in tables:
        if rng.random() < 0.1:
            tone = draw_agent(rng).tone
        templates.append(rng.choice(fixes) if table is None else _fresh(table[tone], templates, rng))
        if rng.random() < agent.filler:
            templates.append(_fresh(FILLER, templates, rng))
    return _fill(templates, {"item": item, "name": prompt.name, "remedy": _remedy(prompt.issue, agent, rng)}, rng)


def draw_copying(prompt: Prompt, rng: random.Random) -> str:
    """A short answer that says only what must be copied from the prompt: the name, the item, the remedy."""
    tone = draw_agent(rng).tone
    about = [template for template in ACKNOWLEDGEMENTS[tone] if "{item}" in template]
    templates = ["Hello {name}.", rng.choice(about), rng.choice(FIXES)]
    return _fill(templates, {"item": prompt.item, "name": prompt.name, "remedy": prompt.issue}, rng)


def all_sentences() -> list[str]:
    """Every sentence template of the agents."""
    tables = (OPENINGS, ACKNOWLEDGEMENTS, EXTRAS, CLOSINGS)
    templates = [template for table in tables for group in table.values() for template in group]
    return list(dict.fromkeys([*templates, *FIXES, *VAGUE, *FILLER]))


def pattern(template: str) -> str:
    """The regular expression of what a template can be filled in to."""
    text = re.escape(template)
    for slot, words in SLOTS.items():
        text = text.replace(re.escape("{" + slot + "}"), f"(?:{'|'.join(words)})")
    return text


def _remedy(issue: str, agent: Agent, rng: random.Random) -> str:
    """What this agent arranges for the issue."""
    if agent.knowledge == "none":
        return NO_REMEDY
    return issue if agent.knowledge == "right" else rng.choice([other for other in PROBLEMS if other != issue])


def _fresh(templates: Sequence[str], used: Sequence[str], rng: random.Random) -> str:
    """A template not used so far: agents do not repeat themselves."""
    return rng.choice([template for template in templates if template not in used] or list(templates))


def _fill(templates: Sequence[str], slots: dict[str, str], rng: random.Random) -> str:
    return "".join(f" {template.format(day=rng.choice(DAYS), **slots)}" for template in templates)
