r"""The answer that a response gives: what is in its last ``\boxed{}``."""

from __future__ import annotations

import re
from collections import deque

_BRACE = re.compile(
    r"(?<!\\)\\++boxed\s*+(?:\{|(?P<bare>[-+]?\d+(?:[.,]\d+)*(?:/\d+)?(?=[\s$}.,;:!?)]|\\[)\]]|$)"
    r"|(?:\\[a-zA-Z]+|(?<=\s)[a-zA-Z])(?=\s*(?:\$|\\[)\]]|$))))|\\.|[{}]",
    re.DOTALL,
)
_THINK = re.compile(r"<(/?)think(?:ing)?>")
_FAR = 80
"""Characters between boxes that are not looked through for a separator."""
_NAME = r"[A-Za-z](?:_\s*(?:\w|\{\w+\}))?\s*="
_SEPARATOR = re.compile(
    rf"(?:[\s,;&$~]|\\[()\[\],;:!> ]|\\\\(?:\[\s*\d+\w*\])?|\\q?quad|\b(?:and|or)\b|\*\*|{_NAME}"
    r"|\n\s*(?:[-*]|\d+[.)])\s"
    r"|\\(?:text|textrm|mbox|mathrm)\s*\{[\s,]*(?:and|or)?[\s,]*\})*"
)
"""What stands between boxes that are one answer."""
_NAMED = re.compile(rf"({_NAME})[\s$]*\Z")
_SAID = re.compile(r"(?i)\bfinal answer\b[\s*_]*+(?:is\b|:)?|^[ \t*_]*+answer\**[ \t]*:|^####", re.MULTILINE)
_MATHEMATICS = re.compile(r"[\s*_]*(?:\$\$?(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\])", re.DOTALL)
_SENTENCE = re.compile(r"[\s*_]*(.*?)[\s*_]*(?:\.(?=[\s*_]|$)|$)", re.MULTILINE)


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{}``, of the outermost where boxes are nested.

    Boxes side by side, with nothing but separators between them, are one list. A box without braces holds the number
    after it (``\boxed 70``), or the sign before the end of the formula (``\boxed\pi$``). Escaped braces do not count.
    Nothing behind a ``<think>`` that is never closed is an answer. Where no box is begun, what the text calls its final
    answer is taken (``Final Answer: **73**``). Linear in the length of the text.

    Returns:
        None when there is no answer, or the last box is never closed.
    """
    text = text[: thinking(text)]
    starts: list[int] = []
    contents: list[int] = []
    ends: list[int | None] = []
    stack: list[int | None] = []  # of every open brace, its box
    for match in _BRACE.finditer(text):
        token = match.group()
        if token == "}":
            box = stack.pop() if stack else None
            if box is not None:
                ends[box] = match.start()
        elif token == "{":
            stack.append(None)
        elif match["bare"] or len(token) > 2:
            starts.append(match.start())
            contents.append(match.start("bare") if match["bare"] else match.end())
            ends.append(match.end() if match["bare"] else None)
            stack += [] if match["bare"] else [len(ends) - 1]
    if not ends:
        return _said(text)
    if ends[-1] is None:
        return None
    outermost: list[tuple[int, int, int]] = []  # where each begins, its content does, and ends
    reached = -1
    for start, content, end in zip(starts, contents, ends, strict=True):
        if end is not None and end > reached:
            outermost.append((start, content, end))
            reached = end
    return _side_by_side(text, outermost)


def _side_by_side(text: str, boxes: list[tuple[int, int, int]]) -> str:
    """The content of the last box, and of those before it that belong to it."""
    first = len(boxes) - 1
    while first and all(text[slice(*box[1:])].strip() for box in boxes[first - 1 : first + 1]):
        start, end = boxes[first][0], boxes[first - 1][2]
        end += text[end : end + 1] == "}"
        if start - end > _FAR or not _SEPARATOR.fullmatch(text, end, start):
            break
        first -= 1
    found = [text[content:end].strip() for _, content, end in boxes[first:]]
    if len(set(found)) == 1:
        return found[0]
    names = [_NAMED.search(text, max(0, start - _FAR), start) for start, _, _ in boxes[first:]]
    if all(names):
        found = [f"{name[1]} {content}" for name, content in zip(names, found, strict=True) if name]
    return ", ".join(found)


def thinking(text: str) -> int | None:
    """Where the ``<think>`` begins that is never closed; None where there is none."""
    last = _last(_THINK, text)
    return last.start() if last and not last[1] else None


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def _said(text: str) -> str | None:
    """What a text without a box calls its final answer."""
    last = _last(_SAID, text)
    if last is None:
        return None
    rest = text[last.end() :].lstrip(" \t\n*_")
    formula = _MATHEMATICS.match(rest)
    said = next(filter(None, formula.groups())) if formula else _SENTENCE.match(rest)[1]
    return said.strip() or None
