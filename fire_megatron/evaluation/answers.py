r"""What an answer says: the last ``\boxed{}`` of a text, and rules that settle equality before any algebra.

The rules cover what a computer algebra system reads wrongly or not at all: scientific notation (``4.5e33`` is no
product with e), numbers too small for its rounding, words, units, lists without an order. What they leave open goes to
the ``algebra`` that is passed in. Everything here is text and exact arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

Algebra = Callable[[str, str], bool]
"""Whether two LaTeX expressions are equal: the right answer, the given answer."""
ROUNDING = Fraction(1, 2_000_000)
"""Decimals are equal when they differ by at most half of the sixth place, of the number itself where it is below 1."""
_LARGEST_EXPONENT = 400
"""Powers of ten beyond this are no number that is worth writing out."""

_BRACE = re.compile(r"\\+boxed\s*\{|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{}``, of the outermost where boxes are nested.

    Escaped braces do not count. Linear in the length of the text.

    Returns:
        None when there is no box, or the last one is never closed.
    """
    starts: list[int] = []
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
        elif len(token) > 2:
            stack.append(len(starts))
            starts.append(match.end())
            ends.append(None)
    if not ends or ends[-1] is None:
        return None
    last = ends[-1]
    outermost = next(box for box, end in enumerate(ends) if end is not None and end >= last)
    return text[starts[outermost] : ends[outermost]].strip()


# ---- one way of writing ------------------------------------------------------------------------------------------

_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "°": r"^{\circ}", "π": r"\pi ",
        "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∈": r"\in ", "²": "^{2}",
        "³": "^{3}", "√": r"\sqrt ", "，": ",", "\u00a0": " ", "\u200b": "", "\0": "",
    }
)  # fmt: skip
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|sqrt|log|ln|exp"
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\+boxed\s*\{", "{"),
        (r"\\?\$", ""),  # delimiters and currency
        (r"(?<=\d),\\!\s*(?=\d{3})|(?<=\d)\{,\}(?=\d{3})", ""),  # separators of thousands that cannot be commas
        (r"\\(?:left|right)\s*\.", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|limits)(?![a-zA-Z])", ""),
        (r"(?<!\\)\\[!,;:> ]|~|\\q?quad(?![a-zA-Z])|\\(?:thin|med|thick)space(?![a-zA-Z])", " "),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:geqslant|geq)(?![a-zA-Z])", r"\\ge"),
        (r"\\(?:leqslant|leq)(?![a-zA-Z])", r"\\le"),
        (r"\\(?:text|math)(?:rm|bf|it|sf|tt|normal)\s*\{|\\(?:mbox|operatorname|text)\s*\{", r"\\text{"),
        (r",?\s*(?:\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)", ","),
        (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![a-zA-Z])", r"^{\\circ}"),
        (r"'", r"^{\\prime}"),
        (r"\b(?:np|numpy|math)\.(?=[a-z])", ""),
        (r"\*\*", "^"),
        (rf"(?<![\\a-zA-Z])({_FUNCTIONS})(?![a-zA-Z])", r"\\\1"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<=\d)\.(?=\s*(?:$|[-+*/,)\]]))", ""),  # 1./3
        (r"(?<![\w.\\^])(\d+\.?\d*|\.\d+)[eE]([-+]?)0*(\d+)(?![\w.])", r"\1 \\times 10^{\2\3}"),
        (r"\^\{\+(?=\d+\})", "^{"),
        (r"\s+", " "),
    )
)


def normalise(answer: str) -> str:
    """One way of writing for what is only written differently: delimiters, spacing, fonts, signs beyond ASCII, Python
    forms of functions and numbers. Still LaTeX."""
    text = answer.translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(" .,;:")


def _key(text: str) -> str:
    """Equal for answers that differ by spaces, text commands and needless braces."""
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    bare = re.sub(r"(?<=\\)([a-zA-Z]+) (?=[a-zA-Z])", r"\1\\ ", bare)  # the space that ends a command
    return re.sub(r"(?<=[_^])\{(\w)\}", r"\1", bare.replace(" ", ""))


# ---- numbers -----------------------------------------------------------------------------------------------------

_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_POWER_OF_TEN = r"10\s*\^\s*\{{?\s*(?P<{}>[-+]?\d{{1,4}})\s*\}}?"
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*(?:(?P<digits>\d[\d,]*\.?\d*|\.\d+)"
    rf"(?:\s*(?:\\times|\\cdot|\*)\s*{_POWER_OF_TEN.format('exponent')})?|{_POWER_OF_TEN.format('power')})"
    r"\s*(?P<percent>\\?%|percent|\\text\{\s*percent\s*\})?(?:_\s*\{?\s*(?P<base>\d+)\s*\}?)?",
    re.ASCII,
)


@dataclass(frozen=True)
class _Number:
    value: Fraction
    percent: bool
    base: int | None

    def equals(self, other: _Number) -> bool:
        """A base has to agree where both name one; a percentage is its number, or a hundredth of it."""
        if None not in (self.base, other.base) and self.base != other.base:
            return False
        if self.percent == other.percent:
            return close(self.value, other.value)
        return close(self.value, other.value) or close(
            self.value / (100 if self.percent else 1), other.value / (100 if other.percent else 1)
        )


def close(a: Fraction, b: Fraction) -> bool:
    """Whether two numbers are equal to :data:`ROUNDING`; whole numbers only if they are the same."""
    return abs(a - b) <= ROUNDING * min(1, max(abs(a), abs(b)))


def _number(text: str) -> _Number | None:
    """A decimal number with its thousands, power of ten, percent sign or base; None for anything else."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    digits, exponent = match["digits"] or "1", int(match["exponent"] or match["power"] or 0)
    if abs(exponent) > _LARGEST_EXPONENT or ("," in digits and not _THOUSANDS.fullmatch(digits)):
        return None
    value = Fraction(digits.replace(",", "").rstrip(".")) * Fraction(10) ** exponent
    base = match["base"]
    return _Number(-value if match["sign"] == "-" else value, match["percent"] is not None, base and int(base))


# ---- words, units, lists -----------------------------------------------------------------------------------------

_WORDS = re.compile(r"\(?[A-Za-z][A-Za-z' -]*\)?")
_TEXT_UNIT = re.compile(r"(?:\s|/|\\cdot)*\\text\s*\{[^{}]*\}(?:\s*\^\s*\{?[-+]?\d\}?)?\s*$")
_UNIT = r"(?:[A-Za-z]{2,}|[mgsKNJWVALh])(?:\s*\^\s*\{?[-+]?\d\}?)?"
_BARE_UNIT = re.compile(rf"(?<=[\d}}\s)])\s*/?\s*(?<![\\A-Za-z]){_UNIT}(?:\s*(?:/|\\cdot)?\s*{_UNIT})*$")
_DEGREES = re.compile(r"\^\{\\circ\}")
_TRIGONOMETRY = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)")


def _words(text: str) -> str | None:
    """Lower-case words, out of their text command and parentheses; None for an answer that is not of words."""
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip()
    return " ".join(bare.strip("()").casefold().split()) if _WORDS.fullmatch(bare) else None


def _without_units(text: str, *, bare: bool) -> str:
    """The text without degrees and units at its end; ``bare``: also units outside of text commands. An answer is
    never all unit."""
    if not _TRIGONOMETRY.search(text):
        text = _DEGREES.sub("", text)
    for pattern in (_TEXT_UNIT, _BARE_UNIT) if bare else (_TEXT_UNIT,):
        while (shorter := pattern.sub("", text).strip()) not in ("", text):
            text = shorter
    return text


_LETTERS = re.compile(r"(?<!\\)(?<![a-zA-Z])[a-zA-Z]")
_OPEN, _CLOSE = "([{", ")]}"


def _top_level(text: str) -> Iterator[tuple[int, str, int]]:
    """Position, character and depth of brackets and commas; a closing bracket has the depth of its opening one."""
    depth = 0
    for match in re.finditer(r"\\[{}]|\\.|[\[\](){},]", text):
        character = match.group()[-1]
        if match.group()[0] == "\\" and character not in "{}":
            continue
        depth -= character in _CLOSE
        yield match.start(), character, depth
        depth += character in _OPEN


def _split(text: str) -> list[str]:
    """The parts between commas outside of all brackets."""
    cuts = [position for position, character, depth in _top_level(text) if character == "," and depth == 0]
    return [text[a + 1 : b].strip() for a, b in zip([-1, *cuts], [*cuts, len(text)], strict=True)]


@dataclass(frozen=True)
class _List:
    kind: str
    """``set``, or the brackets of a tuple or interval, whose order counts."""
    items: Sequence[str]


def _list(text: str, *, split_thousands: bool) -> _List | None:
    """Several answers, or coordinates; None for a single expression. ``1,234`` is a number unless the other answer is
    a list."""
    brackets = [(p, c) for p, c, depth in _top_level(text) if depth == 0 and c != ","]
    escaped = text.startswith(r"\{") and text.endswith(r"\}")
    enclosed = len(brackets) == 2 and brackets[1][0] + 1 + escaped == len(text) and brackets[0][0] == 0
    if enclosed and escaped:
        return _List("set", _split(text[2:-2]))
    if enclosed and text[0] in "([":
        items = _split(text[1:-1])
        return _List(text[0] + text[-1], items) if len(items) > 1 else None
    items = _split(text)
    if len(items) == 1 or (_THOUSANDS.fullmatch(text.lstrip("+-").replace(" ", "")) and not split_thousands):
        return None
    return _List("set", items)


# ---- equality ----------------------------------------------------------------------------------------------------


def equal(gold: str, answer: str, algebra: Algebra) -> bool:
    """Whether an answer says what the right one says.

    Args:
        gold: the right answer, as in a benchmark file.
        answer: the given one, as in the box.
        algebra: asked about what the rules leave open.
    """
    right, given = normalise(gold), normalise(answer)
    if not right or not given:
        return False
    if _equal(right, given, algebra):
        return True
    # In the right answer a bare letter may be a variable. Where it has none, letters after a number are a unit.
    right_value = _without_units(right, bare=False)
    given_value = _without_units(given, bare=_LETTERS.search(right_value) is None)
    return (right_value, given_value) != (right, given) and _equal(right_value, given_value, algebra)


def _equal(right: str, given: str, algebra: Algebra) -> bool:
    if _key(right) == _key(given):
        return True
    words = _words(right), _words(given)
    if None not in words and words[0] == words[1]:
        return True
    if words[0] is not None and r"\text" in right:
        return False
    numbers = _number(right), _number(given)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0].equals(numbers[1])
    listed = _list(right, split_thousands=False)
    other = _list(given, split_thousands=listed is not None)
    if listed is None or other is None or listed.kind != other.kind or any(r"\pm" in text for text in (right, given)):
        return algebra(right, given)
    return _same_items(listed, other, algebra)


def _same_items(right: _List, given: _List, algebra: Algebra) -> bool:
    """Item by item, in any order for a set."""
    left = list(given.items)
    if len(left) != len(right.items):
        return False
    for item in right.items:
        places = range(len(left)) if right.kind == "set" else range(1)
        found = next((place for place in places if _equal(item, left[place], algebra)), None)
        if found is None:
            return False
        del left[found]
    return True
