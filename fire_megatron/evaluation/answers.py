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

from fire_megatron.evaluation.units import without_units

Algebra = Callable[[str, str], bool]
"""Whether two LaTeX expressions are equal: the right answer, the given answer."""
ROUNDING = Fraction(1, 2_000_000)
"""Decimals are equal when they differ by at most half of the sixth place, of the number itself where it is below 1."""
_LARGEST_EXPONENT = 400
"""Powers of ten beyond this are no number that is worth writing out."""

_BRACE = re.compile(
    r"(?<!\\)\\++boxed\s*+(?:\{|(?P<bare>[-+]?\d+(?:[.,]\d+)*(?:/\d+)?(?=[\s$}.,;:!?)]|\\[)\]]|$)"
    r"|(?:\\[a-zA-Z]+|(?<=\s)[a-zA-Z])(?=\s*(?:\$|\\[)\]]|$))))|\\.|[{}]",
    re.DOTALL,
)


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{}``, of the outermost where boxes are nested.

    A box without braces holds the number after it (``\boxed 70``), or the sign before the end of the formula
    (``\boxed\pi$``). Escaped braces do not count. Linear in the length of the text.

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
        elif match["bare"]:
            starts.append(match.start("bare"))
            ends.append(match.end())
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
        "³": "^{3}", "√": r"\sqrt ", "≈": r"\approx ", "∅": r"\emptyset ", "Ω": r"\Omega ", "Å": r"\AA ", "±": r"\pm ",
        "，": ",", "\u00a0": " ", "\u200b": "", "\0": "",
    }
)  # fmt: skip
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|sqrt|log|ln|exp"
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


def _recurring(match: re.Match[str]) -> str:
    """The fraction that a recurring decimal is."""
    whole, fixed, period = match.groups()
    ends = 10 ** len(fixed)
    value = Fraction(int(whole + fixed or "0"), ends) + Fraction(int(period), ends * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _scaled(match: re.Match[str]) -> str:
    rest = rf"\text{{{match['rest']}}}" if (match["rest"] or "").strip() else ""
    return rf" \times 10^{{{_SCALES[match['scale'] or match['word']]}}}{rest}"


_REWRITES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\+boxed\s*\{", "{"),
        (r"\\?\$", ""),  # delimiters and currency
        (r"(?<=\d)(?:,\\!\s*|\{,\}|\\[,;:] ?)(?=\d{3}(?!\d))", ""),  # separators of thousands that cannot be commas
        (r"\\(?:left|right)\s*\.", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|limits)(?![a-zA-Z])", ""),
        (r"(?<!\\)\\[!,;:> ]|~|\\q?quad(?![a-zA-Z])|\\(?:thin|med|thick)space(?![a-zA-Z])", " "),
        (r"^\s*([a-zA-Z]?)\s*(?:=|\\(?:approx|simeq)(?:eq)?(?![a-zA-Z]))", r"\1="),
        (r"^=\s*", ""),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset"),
        (r"(?<![\d.])(\d{0,15})\.(\d{0,15})\\(?:overline|bar|dot)\s*\{?(\d{1,15}+)\}?", _recurring),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\(?:geqslant|geq)(?![a-zA-Z])", r"\\ge"),
        (r"\\(?:leqslant|leq)(?![a-zA-Z])", r"\\le"),
        (r"\\math(?:bf|it|sf|normal)\s*\{\s*(\w)\s*\}|\\mathrm\s*\{\s*([ie])\s*\}", r" \1\2"),  # variables
        (r"\\(?:text|math)(?:rm|bf|it|sf|tt|normal)\s*\{|\\(?:mbox|operatorname|text)\s*\{", r"\\text{"),
        (r",?\s*(?:\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)", ","),
        (
            rf"(?<=[\d}}])\s*(?:\\text\{{\s*(?P<scale>{'|'.join(_SCALES)})\b(?P<rest>[^{{}}]*)\}}"
            rf"|\b(?P<word>{'|'.join(_SCALES)})\b)",
            _scaled,
        ),
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
        (r"(?<![\d.^_])(\d{1,3}) (\d{3})(?: (\d{3}))?(?: (\d{3}))?(?!\d| \d)", r"\1\2\3\4"),
    )
)


def normalise(answer: str) -> str:
    """One way of writing for what is only written differently: delimiters, spacing, fonts, signs beyond ASCII, Python
    forms of functions and numbers. Still LaTeX."""
    text = answer.translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(" .,;:\\")


def key(answer: str) -> str:
    """Equal for answers that are the same after one way of writing."""
    return _key(normalise(answer))


def _key(text: str) -> str:
    """Equal for answers that differ by spaces, text commands and needless braces. A space between digits counts."""
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    bare = re.sub(r"(?<=\\)([a-zA-Z]+) (?=[a-zA-Z])", r"\1\\ ", bare)  # the space that ends a command
    return re.sub(r"(?<=[_^])\{(\w)\}", r"\1", re.sub(r"(?<!\d) | (?!\d)", "", bare))


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
        """A base has to agree with the right answer's, which may be all that is known of it: ``52`` is right for
        ``52_8``. A percentage is its number, or a hundredth of it.

        Args:
            other: the given answer.
        """
        if other.base is not None and other.base != (self.base or 10):
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


# ---- words and lists ---------------------------------------------------------------------------------------------

_WORDS = re.compile(r"\(?[A-Za-z][A-Za-z' -]*\)?")


def _words(text: str) -> str | None:
    """Lower-case words, out of their text command and parentheses; None for an answer that is not of words."""
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip()
    return " ".join(bare.strip("()").casefold().split()) if _WORDS.fullmatch(bare) else None


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
        return _List("set", _both_signs(_split(text[2:-2])))
    if enclosed and text[0] in "([" and r"\pm" not in text:
        items = _split(text[1:-1])
        return _List(text[0] + text[-1], items) if len(items) > 1 or text[0] == "[" else None
    items = _split(text)
    thousands = _THOUSANDS.fullmatch(text.lstrip("+-").replace(" ", "")) and not split_thousands
    items = [text] if thousands else _both_signs(items)
    return _List("set", items) if len(items) > 1 else None


_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![a-zA-Z])\s*")


def _both_signs(items: Sequence[str]) -> list[str]:
    r"""Items with ``\pm`` twice: upper signs, lower signs."""

    def signed(item: str, plus: str) -> str:
        chosen = _PLUS_MINUS.sub(lambda sign: "+" if sign[1] == plus else "-", item)
        return re.sub(r"(^|[=({,])\s*\+", r"\1", chosen)

    return [
        version
        for item in items
        for version in ([signed(item, "pm"), signed(item, "mp")] if _PLUS_MINUS.search(item) else [item])
    ]


_ASSIGNMENT = re.compile(r"([A-Za-z](?:_\s*(?:\w|\{\w+\}))?)\s*=([^=<>]+)")


def _by_name(items: Sequence[str]) -> dict[str, str] | None:
    """Values by the names they are given (``y=2, x=3``), in the order of the names; None for other lists."""
    pairs = [_ASSIGNMENT.fullmatch(item) for item in items]
    if not all(pairs):
        return None
    values = {pair[1].replace(" ", ""): pair[2].strip() for pair in pairs if pair}
    return dict(sorted(values.items())) if len(values) == len(items) else None


_VALUE = r"(?P<{}>[^<>=,]+?)"
_RELATION = re.compile(
    rf"(?:{_VALUE.format('low')}\s*(?P<after>\\le(?![a-zA-Z])|<)\s*)?(?P<name>[A-Za-z])\s*"
    rf"(?P<sign>\\[lg]e(?![a-zA-Z])|[<>])\s*{_VALUE.format('value')}"
)


def _union(text: str) -> str:
    """Inequalities for one variable, any of which may hold (``x<2, x>3``), as a union of intervals."""
    relations = [_RELATION.fullmatch(item) for item in _split(text)]
    if len(relations) < 2 or not all(relations) or len({r["name"] for r in relations if r}) > 1:
        return text
    return r"\cup ".join(_interval(relation) for relation in relations if relation)


def _interval(relation: re.Match[str]) -> str:
    low, sign, value = relation["low"], relation["sign"], relation["value"]
    if sign in (">", r"\ge"):
        return rf"{'(' if sign == '>' else '['}{value},\infty)"
    start = r"(-\infty" if low is None else f"{'(' if relation['after'] == '<' else '['}{low}"
    return f"{start},{value}{')' if sign == '<' else ']'}"


# ---- equality ----------------------------------------------------------------------------------------------------

_REMARK = re.compile(
    r"(?<=[^_^\s])\s*(?<!_)(?<!\^)\\text\s*\{(?!\s*\})(?:[^{}]|\{[^{}]*\})*\}(?:\s*\^\s*\{?[-+]?\d\}?)?$"
)
"""Text at the end of a formula, which algebra leaves out."""
_APART = re.compile(r"(?<![\^_\d.])\d+ \d")
"""Digits that algebra puts together."""


def equal(gold: str, answer: str, algebra: Algebra) -> bool:
    """Whether an answer says what the right one says.

    Args:
        gold: the right answer, as in a benchmark file.
        answer: the given one, as in the box.
        algebra: asked about what the rules leave open.
    """
    right, given = normalise(gold), normalise(answer)
    return bool(right and given) and _equal(right, given, algebra)


def _equal(right: str, given: str, algebra: Algebra) -> bool:
    """As they stand, or without their units."""
    if _same(right, given, algebra):
        return True
    # In the right answer a bare letter may be a variable. Where it has none, a known unit after a number is a unit.
    right_value = without_units(right, bare=False)
    given_value = without_units(given, bare=_LETTERS.search(right_value) is None)
    return (right_value, given_value) != (right, given) and _same(right_value, given_value, algebra)


def _same(right: str, given: str, algebra: Algebra) -> bool:
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
    if any(pattern.search(text) for pattern in (_REMARK, _APART) for text in (right, given)):
        return False
    if r"\cup" in right + given:
        return algebra(_union(right), _union(given))
    listed = _list(right, split_thousands=False)
    other = _list(given, split_thousands=listed is not None)
    if listed is None or other is None:
        return not any(side and side.kind == "[]" and len(side.items) == 1 for side in (listed, other)) and algebra(
            right, given
        )
    return _same_items(listed, other, algebra)


def _same_items(right: _List, given: _List, algebra: Algebra) -> bool:
    """Item by item, in any order for a set. Values with names are a tuple in the order of their names."""
    names = _by_name(right.items), _by_name(given.items)
    if names[0] and names[1]:
        if names[0].keys() != names[1].keys():
            return False
        right, given = (_List("()", list(values.values())) for values in names if values)
    elif names[1] and right.kind == "()":
        given = _List("()", list(names[1].values()))
    elif names[0] and given.kind == "()":
        right = _List("()", list(names[0].values()))
    left = list(given.items)
    if right.kind != given.kind or len(left) != len(right.items):
        return False
    for item in right.items:
        places = range(len(left)) if right.kind == "set" else range(1)
        found = next((place for place in places if _equal(item, left[place], algebra)), None)
        if found is None:
            return False
        del left[found]
    return True
