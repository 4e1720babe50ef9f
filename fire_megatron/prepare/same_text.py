"""When two problems are the same text: what typing, LaTeX's looks and the usual instructions add is taken away."""

from __future__ import annotations

import re
import unicodedata

_LOOKS = re.compile(
    r"\\\\"  # a line break of LaTeX stays, and is not the start of what follows it
    r"|\\[ ,;:!>()\[\]$]"
    r"|\\(?:left|right|bigg?[lrm]?|quad|qquad|displaystyle|textstyle|limits|nolimits|thinspace|enspace|hfill)(?![a-z])"
    r"|[$~]"
)
"""Spacing, sizes of brackets and the signs that begin and end a formula."""
_COMMAND = re.compile(r"\\(?:[dtc](?=frac(?![a-z])))?([a-z]+)")
"""A command, of which the three other fractions are sizes of one; what follows it may or may not be set off."""
_NEEDLESS_SPACE = re.compile(r"(?<=\W) | (?=\W)")
_OWN_WORDS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Kana and Han, written without spaces: each is a word."""
_WORD = re.compile(rf"[{_OWN_WORDS}]|[^\W_{_OWN_WORDS}]+")

_BOXED = r"(?:with)?in \\boxed ?\{ ?\}"
_FINAL = r"(?:put|output|give|write|present|place|return|provide|enclose) (?:your|the) (?:final )?answer " + _BOXED
_STEP = r"(?:please |let['’]s |let us )?(?:reason|think|solve (?:it|this|the problem)) step[ -]by[ -]step"
_LEADS = (
    r"solve the following math problem step by step\. the last line of your response should be (?:of the form )?"
    r"answer: ?\\?answer \(without quotes\) where \\?answer is the answer to the problem\.?",
)
_CLOSES = (
    rf"{_STEP}[,.]?(?: and)? ?(?:please |then |finally )?{_FINAL}",
    rf"(?:please |and |then )?{_FINAL}",
    _STEP,
    r"remember to put your answer on its own line after \"answer: ?\"",
)
_LEAD = re.compile(rf"^(?:{'|'.join(_LEADS)})\s*")
_CLOSE = re.compile(rf"(?:^|(?<=\W))(?:{'|'.join(_CLOSES)})[.:!]?\s*$")
_CLOSE_SIGN = re.compile(r"boxed|step|own line")
_CLOSE_LENGTH = 200
"""Characters from the end in which a closing instruction begins."""


def plain(text: str) -> str:
    """What stays of a problem when what does not change it is gone.

    Unicode is normalised (NFKC), letters are small, LaTeX's spacing, bracket sizes and math delimiters are gone, as are
    spaces beside anything but letters and digits, and the instructions that data sets and benchmarks put around a
    problem ("Please reason step by step, and put your final answer within \\boxed{}."). Numbers, signs and words
    stay: two problems that differ in one are different. Empty for a text that is an instruction only.
    """
    text = unicodedata.normalize("NFKC", text).casefold().strip()
    text = _LOOKS.sub(lambda m: m[0] if m[0] == "\\\\" else " ", text)
    text = _COMMAND.sub(r"\\\1 ", text)
    text = _without_instructions(" ".join(text.split()))
    return _NEEDLESS_SPACE.sub("", text)


def _without_instructions(text: str) -> str:
    text = _LEAD.sub("", text)
    while True:
        start = max(0, len(text) - _CLOSE_LENGTH)
        found = _CLOSE_SIGN.search(text, start) and _CLOSE.search(text, start)
        if not found:
            return text
        text = text[: found.start()].rstrip()


def words(text: str) -> list[str]:
    """Words and numbers of a :func:`plain` text, without signs; a LaTeX command's name is a word."""
    return _WORD.findall(text)
