"""Texts cut into segments, as 2D-DPO scores them: sentences; code, tables and lists whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from markdown_it import MarkdownIt

# A line under a paragraph would make it one heading, and a tag at its beginning keep it whole.
_MARKDOWN = MarkdownIt("commonmark").enable("table").disable(["lheading", "html_block"])

_CLOSING = r"[)\]}\"'”’»*_`~]*"
_END = re.compile(rf"(?P<stop>[.!?…]+){_CLOSING}\s+|[。！？]+{_CLOSING}\s*")
_INLINE_CODE = re.compile(r"(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)", re.DOTALL)

_NEVER_LAST = {"mr", "mrs", "ms", "dr", "prof", "st", "vs", "cf", "approx", "e.g", "i.e"}
_SELDOM_LAST = {"etc", "al", "inc", "ltd", "co", "corp", "jr", "sr", "a.m", "p.m", "u.s", "u.k", "ph.d"}
_BEFORE_NUMBERS = {"no", "nos", "fig", "eq", "vol", "p", "pp", "ch", "sec"}


def cut_into_segments(text: str) -> list[str]:
    """The segments of a text in (or not in) Markdown, in order: joined, they are the text.

    A sentence ends with its final punctuation and takes the white space after it; one that holds neither letter nor
    digit goes to its neighbour. A block (fenced code, table, list, quotation, heading) is one segment.
    """
    pieces = [text[start:end] for start, end in pairwise(sorted({0, *_find_starts(text), len(text)}))]
    segments: list[str] = []
    for piece in pieces:
        if segments and not (_has_word(piece) and _has_word(segments[-1])):
            segments[-1] += piece
        else:
            segments.append(piece)
    return segments


def _find_starts(text: str) -> Iterator[int]:
    lines = [0, *(newline.end() for newline in re.finditer(r"\r\n?|\n", text)), len(text)]
    for token in _MARKDOWN.parse(text):
        if token.level == 0 and token.map:
            start, end = (lines[min(line, len(lines) - 1)] for line in token.map)
            yield start
            if token.type == "paragraph_open":
                yield from (start + offset for offset in _find_sentence_starts(text[start:end]))


def _find_sentence_starts(paragraph: str) -> Iterator[int]:
    masked = _INLINE_CODE.sub(lambda code: "x" * len(code[0]), paragraph)
    for end in _END.finditer(masked):
        if end.end() < len(masked) and not (end["stop"] and _goes_on(masked, end)):
            yield end.end()


def _goes_on(text: str, end: re.Match[str]) -> bool:
    """Whether a full stop belongs to an abbreviation, an initial, a number in a list or a pause."""
    if set(end["stop"]) & set("!?"):
        return False
    after = text[end.end()]
    if end["stop"] != ".":
        return after.islower()
    word = re.search(r"[\w.]*\Z", text[max(0, end.start() - 16) : end.start()])[0]  # type: ignore[index]
    initial = len(word) == 1 and word.isupper() and word != "I"
    word = word.lower()
    return (
        (word in _NEVER_LAST or initial)
        or (word in _SELDOM_LAST and after.islower())
        or (word in _BEFORE_NUMBERS and after.isdigit())
    )


def _has_word(text: str) -> bool:
    return any(character.isalnum() for character in text)
