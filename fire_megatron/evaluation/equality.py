r"""Whether two answers say the same: rules that settle it before any algebra.

The rules cover what a computer algebra system reads wrongly or not at all: scientific notation (``4.5e33`` is no
product with e), numbers too small for its rounding, words, units, lists without an order, what an equation is said of.
What they leave open goes to the ``algebra`` that is passed in. Everything here is text and exact arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from fire_megatron.evaluation.notation import bare_key, normalise, without_text_commands
from fire_megatron.evaluation.numbers import written_number
from fire_megatron.evaluation.structure import (
    AnswerList,
    Chain,
    answer_list,
    by_name,
    has_letters,
    solutions,
    split_unions,
    usual_brackets,
)
from fire_megatron.evaluation.units import REFUSED, without_units

Algebra = Callable[[str, str], bool]
"""Whether two LaTeX expressions are equal: the right answer, the given answer."""

# ---- words -------------------------------------------------------------------------------------------------------

_WORDS = re.compile(r"\(?[A-Za-z][A-Za-z' -]*\)?")
_PRODUCT = 5
"""Letters from which on they are rather a word than a product."""
_NOTHING = re.compile(r"(?i)(?:there (?:is|are) )?no (?:real )?solutions?(?: exists?)?|(?:the )?empty set")
_LEAD = re.compile(r"\\text\s*\{([^{}]*?)(?:\b(?:is|are|equals)|[:=])\s*\}\s*(?=\S)")
_ANSWER = re.compile(r"(?i)(\\text\s*\{\s*)?(?:(?:the|final|correct)\s+)*answer\s*(?:\bis\b|[:=])\s*(?=[^\s}])")
_OPTION = re.compile(r"(?:\(([A-Za-z])\)|([A-Z])(?=\s*[.:)]\s*\S))\s*[.:)]?\s*(?![\s+*/^_=,;)(.:-])")
_OPTIONS = re.compile(r"\([A-Z]\)|(?<![A-Za-z])[A-Z]\s*[.:)]")
_NO_TEXT = re.compile(r"(?i:\b(?:false|wrong|incorrect|not)\b)|(?:^|[\s,;])\(?[A-E]\)?$")
"""What does not stand in a choice's text: a verdict on it, or another choice."""
_LETTER = re.compile(r"\(?([A-Za-z])\)?")


def _words(text: str) -> str | None:
    """Lower-case words, out of their text command and parentheses and without an article; None for an answer that is
    not of words. One or two letters outside of text may be variables, whose case counts, A to J options."""
    bare = without_text_commands(text).strip()
    if not _WORDS.fullmatch(bare):
        return None
    words = " ".join(bare.strip("()").split())
    if r"\text" in text or len(words) > 2 or re.fullmatch("[A-Ja-j]", words):
        words = words.casefold()
    return re.sub(r"(?i)^(?:an?|the) (?=[a-z]{3})", "", words)


def _without_lead(text: str) -> str:
    r"""Without a beginning such as ``\text{The answer is }``."""
    answer = _ANSWER.match(text)
    if answer:
        return (answer[1] or "") + text[answer.end() :]
    lead = _LEAD.match(text)
    refused = lead is not None and set(re.findall("[a-z]+", lead[1].lower())) & REFUSED
    return text[lead.end() :] if lead and not refused else text


def _option(text: str) -> tuple[str, str] | None:
    """Letter and text of a choice that is written out (``(E) 12``), or the letter alone; None for anything else."""
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1 ", text).strip()
    letter = _LETTER.fullmatch(bare)
    if letter:
        return letter[1].upper(), ""
    match = _OPTION.match(bare)
    rest = bare[match.end() :].strip() if match else ""
    return ((match[1] or match[2]).upper(), rest) if _is_choice(rest) else None


def _is_choice(text: str) -> bool:
    return bool(text) and not _OPTIONS.search(text) and not _NO_TEXT.search(text)


def _same_option(right: str, given: str, algebra: Algebra) -> bool | None:
    """None where no choice is written out."""
    choices = _option(right), _option(given)
    texts = [choice[1] for choice in choices if choice]
    if not any(texts):
        return None
    if choices[0] and choices[1]:
        same = choices[0][0] == choices[1][0]
        return same and (not all(texts) or _equal(texts[0], texts[1], algebra))
    return choices[1] is not None and _equal(right, texts[0], algebra)


# ---- equality ----------------------------------------------------------------------------------------------------

_REMARK = re.compile(
    r"(?<=[^_^\s])\s*(?<!_)(?<!\^)\\text\s*\{(?!\s*\})(?:[^{}]|\{[^{}]*\})*\}(?:\s*\^\s*\{?[-+]?\d\}?)?$"
)
"""Text at the end of a formula, which algebra leaves out."""
_APART = re.compile(r"(?<![\^_\d.])\d[\d.]* \d")
"""Digits that algebra puts together."""
_DOTS = re.compile(r"^\S.*\\(?:[lcv]?dots[bc]?)(?![a-zA-Z])")
"""A sequence that goes on, which algebra takes for what stands before."""
_SETS = re.compile(r"\\(?:cup|cap|setminus|mathbb|[{}])|[<>]|\\[lgn]e(?![a-z])")


def equal(gold: str, answer: str, algebra: Algebra) -> bool:
    """Whether an answer says what the right one says.

    Args:
        gold: the right answer, as in a benchmark file.
        answer: the given one, as in the box.
        algebra: asked about what the rules leave open.
    """
    right, given = (usual_brackets(_without_lead(normalise(text))) for text in (gold, answer))
    return bool(right and given) and _equal(right, given, algebra)


def _equal(right: str, given: str, algebra: Algebra) -> bool:
    """As they stand, or without their units."""
    right, given = (
        r"\emptyset" if _NOTHING.fullmatch(without_text_commands(text).strip()) else text for text in (right, given)
    )
    if _same(right, given, algebra):
        return True
    # In the right answer a bare letter may be a variable. Where it has none, a known unit after a number is a unit.
    right_value = without_units(right, bare=False)
    given_value = without_units(given, bare=not has_letters(right_value))
    return (right_value, given_value) != (right, given) and _same(right_value, given_value, algebra)


def _same(right: str, given: str, algebra: Algebra) -> bool:
    if bare_key(right) == bare_key(given):
        return True
    words = _words(right), _words(given)
    if None not in words:
        if words[0] == words[1]:
            return True
        if any(r"\text" in text or " " in text or len(text) >= _PRODUCT for text in (right, given)):
            return False
    if words[0] is not None and r"\text" in right and _LETTER.fullmatch(without_text_commands(right)) is None:
        return False
    chosen = _same_option(right, given, algebra)
    if chosen is not None:
        return chosen
    numbers = written_number(right), written_number(given)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0].equals(numbers[1])
    if any(pattern.search(text) for pattern in (_REMARK, _APART, _DOTS) for text in (right, given)):
        return False
    solved = solutions(right), solutions(given)
    if any(solved):
        names = {side[0] for side in solved if side}
        sides = [side[1] if side else text for side, text in zip(solved, (right, given), strict=True)]
        return len(names) == 1 and _same_sets(sides[0], sides[1], algebra)
    return _same_sets(right, given, algebra)


def _same_sets(right: str, given: str, algebra: Algebra) -> bool:
    unions = split_unions(right), split_unions(given)
    if max(map(len, unions)) > 1:
        sets = [AnswerList("set", parts) for parts in unions]
        return _same_items(sets[0], sets[1], algebra) or algebra(right, given)
    listed = answer_list(right, split_thousands=False)
    other = answer_list(given, split_thousands=listed is not None)
    if listed is not None and other is not None:
        return _same_items(listed, other, algebra)
    chains = Chain.of(right), Chain.of(given)
    if any(chains):
        return _same_equations(right, given, chains, algebra)
    lists = [side for side in (listed, other) if side]
    if any(side.kind == "[]" and len(side.items) == 1 for side in lists):
        return False
    several = any(side.kind == "set" and len(side.items) > 1 for side in lists)
    return (not several or bool(_SETS.search(right + given))) and algebra(right, given)


def _same_equations(right: str, given: str, chains: tuple[Chain | None, Chain | None], algebra: Algebra) -> bool:
    """An equation with one plain name on its left is what stands on its right."""
    gold, answer = chains
    if gold is None:
        assert answer is not None
        if answer.head:
            return any(_equal(right, value, algebra) for value in answer.said)
        if not answer.exact:
            return not any(map(has_letters, answer.parts)) and any(_equal(right, x, algebra) for x in answer.said)
        return all(_equal(right, part, algebra) for part in answer.parts)
    if answer is None:
        return bool(gold.head) and any(_equal(value, given, algebra) for value in gold.said)
    if gold.head and answer.head:
        answer = answer if answer.head == gold.head else answer.renamed(gold.head)
        if answer.head == gold.head:
            return any(_equal(value, x, algebra) for value in gold.said for x in answer.said)
    return algebra(right, given)


def _same_items(right: AnswerList, given: AnswerList, algebra: Algebra) -> bool:
    """Item by item, in any order for a set. Values with names are a tuple in the order of their names, unless these
    differ by an index only: ``x_1, x_2`` are solutions in any order."""
    names = by_name(right.items), by_name(given.items)
    if names[0] and names[1]:
        if names[0].keys() != names[1].keys():
            return False
        right, given = (AnswerList("()", list(values.values())) for values in names if values)
    elif names[1] and right.kind == "()":
        given = AnswerList("()", list(names[1].values()))
    elif names[0] and given.kind == "()":
        right = AnswerList("()", list(names[0].values()))
    left = list(given.items)
    if right.kind != given.kind or len(left) != len(right.items):
        return False
    told_apart = any(named and len({re.sub(r"_.*", "", name) for name in named}) > 1 for named in names)
    for item in right.items:
        places = range(len(left)) if right.kind == "set" and not told_apart else range(1)
        found = next((place for place in places if _equal(item, left[place], algebra)), None)
        if found is None:
            return False
        del left[found]
    return True
