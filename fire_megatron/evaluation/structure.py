"""What an answer is made of: lists and their brackets, equations and what they are said of, inequalities.

Everything takes normalised text (:mod:`fire_megatron.evaluation.notation`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fire_megatron.evaluation.notation import bare_key
from fire_megatron.evaluation.numbers import THOUSANDS

_OPEN, _CLOSE = "([{", ")]}"
_TOKEN = re.compile(r"\\[{}]|\\(?:approx|in|cup|le|ge|ne)(?![a-zA-Z])|\\.|[\[\](){},;=<>]")


def _top_level(text: str) -> Iterator[tuple[re.Match[str], int]]:
    """Brackets, separators and relations with their depth; a closing bracket has the depth of its opening one."""
    depth = 0
    for match in _TOKEN.finditer(text):
        last = match.group()[-1]
        if match.group()[0] == "\\" and last not in "{}" and len(match.group()) == 2:
            continue
        depth -= last in _CLOSE
        yield match, depth
        depth += last in _OPEN


def split(text: str, *signs: str) -> tuple[list[str], list[str]]:
    """The parts between signs that stand outside of all brackets, and the signs."""
    cuts = [match for match, depth in _top_level(text) if depth == 0 and match.group() in signs]
    edges = zip([0, *(cut.end() for cut in cuts)], [*(cut.start() for cut in cuts), len(text)], strict=True)
    return [text[a:b].strip() for a, b in edges], [cut.group() for cut in cuts]


# ---- lists -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerList:
    """Several answers, or coordinates."""

    kind: str
    """``set``, or the brackets of a tuple or interval, whose order counts."""
    items: Sequence[str]


def _separated(text: str) -> list[str]:
    """Semicolons part what has commas of its own."""
    parts, signs = split(text, ";")
    return [part for part in parts if part] if signs else split(text, ",")[0]


def answer_list(text: str, *, split_thousands: bool) -> AnswerList | None:
    """None for a single expression. ``1,234`` is a number unless ``split_thousands``."""
    brackets = [(m.start(), m.group()) for m, depth in _top_level(text) if depth == 0 and m.group()[-1] in "()[]{}"]
    escaped = text.startswith(r"\{") and text.endswith(r"\}")
    enclosed = len(brackets) == 2 and brackets[1][0] + 1 + escaped == len(text) and brackets[0][0] == 0
    if enclosed and escaped:
        return AnswerList("set", _both_signs(_separated(text[2:-2])))
    if enclosed and text[0] in "([" and r"\pm" not in text:
        items = _separated(text[1:-1])
        return AnswerList(text[0] + text[-1], items) if len(items) > 1 or text[0] == "[" else None
    thousands = THOUSANDS.fullmatch(text.lstrip("+-").replace(" ", "")) and not split_thousands
    items = [text] if thousands else _both_signs(_grouped(_separated(text)))
    return AnswerList("set", items) if len(items) > 1 else None


def _grouped(items: list[str]) -> list[str]:
    """``p=5, q=2, p=7, q=2`` as two pairs."""
    chains = [Chain.of(item) for item in items]
    heads = [chain.head for chain in chains if chain]
    several = len(set(heads))
    if len(heads) < len(items) or not 1 < several < len(items) or heads != heads[:several] * (len(items) // several):
        return items
    return [", ".join(items[start : start + several]) for start in range(0, len(items), several)]


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


def by_name(items: Sequence[str]) -> dict[str, str] | None:
    """Values by the names they are given (``y=2, x=3``), in the order of the names; None for other lists."""
    chains = [Chain.of(item) for item in items]
    values = {chain.head: chain.said[-1] for chain in chains if chain and chain.head}
    return dict(sorted(values.items())) if len(values) == len(items) else None


# ---- equations ---------------------------------------------------------------------------------------------------

_GREEK = (
    r"\\(?:(?:var)?(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|chi"
    r"|psi|omega)|Gamma|Delta|Theta|Lambda|Xi|Sigma|Phi|Psi|Omega|ell|hbar|Pr|max|min)(?![a-zA-Z])"
)
_ACCENT = r"\\(?:overline|overrightarrow|vec|hat|widehat|bar|tilde|dot|mathbb|mathcal|mathfrak|text)\s*\{[^{}]*\}"
_INDEX = r"(?:\s*_\s*(?:\w|\\[a-zA-Z]+|\{(?:[^{}]|\{[^{}]*\})*\})|\s*\^\s*(?:\*|\{\s*(?:(?:\\prime\s*)+|\*)\s*\}))"
_LABEL = rf"(?:[A-Z]{_INDEX}?\s*){{2,}}"
"""Points, one after another: a segment, a polygon."""
_SYMBOL = rf"(?:[A-Za-z]|{_GREEK}|{_ACCENT})"
_PLAIN = rf"(?:\\(?:angle|triangle|Delta)\s*)?(?:{_LABEL}|[A-Z][a-z]{{2,}}|{_SYMBOL}){_INDEX}*"
_ARGUMENTS = r"\(\s*(?:[\w\s,;|]|\\[a-zA-Z]+|=|<|>|_\s*\{\w+\}|\^\s*\{\w+\})*\)|\[\s*[\w\s^]*\]"
_NAME = re.compile(
    rf"{_PLAIN}|(?:[fghuvwyzA-Z]|{_GREEK}|{_ACCENT}|\\text\s*\{{[^{{}}]*\}}|[a-z](?=_)){_INDEX}*(?:\^\s*\{{\s*-1\s*\}})?"
    rf"\s*(?:{_ARGUMENTS})|[fghFGHPE]{_INDEX}*\s*\((?:[^()]|\([^()]*\))*\)"
    rf"|\|\s*(?:{_LABEL}|{_ACCENT})\s*\||\[[A-Z]{{3,}}\]|\\text\s*\{{[^{{}}]*\}}\s*(?:\\triangle\s*)?{_PLAIN}"
    r"|\\frac\s*\{d[a-zA-Z]?\}\s*\{d[a-zA-Z]\}|\\frac\s*\{d\s*[a-z]\}\s*\{d\s*[a-z]\}"
)
_NAMES = re.compile(rf"\(?\s*{_PLAIN}(?:\s*,\s*{_PLAIN})+\s*\)?")
_FREE = re.compile(rf"(?<!\\)(?<![a-zA-Z])[a-zA-Z](?<!e)|{_GREEK}")


def has_letters(text: str) -> bool:
    """Whether there is a variable, e and pi apart."""
    return _FREE.search(text) is not None


@dataclass(frozen=True)
class Chain:
    """An equation, or several in a row."""

    head: str
    """What the rest is said of, where that is one plain name (or a tuple of names); else empty."""
    parts: Sequence[str]
    """The sides, without the head."""
    said: Sequence[str]
    """Sides that an answer may be: the last, and the last before each approximation."""
    exact: bool
    """Whether nothing is approximated."""

    @classmethod
    def of(cls, text: str) -> Chain | None:
        """None for what is no equation, or several."""
        if split(text, ",", ";")[1]:
            return None
        parts, signs = split(text, "=", r"\approx", r"\in")
        parts = [part.removesuffix(":").strip() for part in parts]
        if not signs or not all(parts):
            return None
        if signs == ["="] and not _named(parts[0]) and _named(parts[1]):
            parts.reverse()
        head = bare_key(parts[0]) if _named(parts[0]) else ""
        rest, between = (parts[1:], signs[1:]) if head else (parts, signs)
        said = [part for part, sign in zip(rest, [*between, r"\approx"], strict=True) if sign == r"\approx"]
        return cls(head, rest, said, r"\approx" not in signs)

    def renamed(self, head: str) -> Chain:
        """With the variable of another head, where that is all in which the heads differ (``a_k``, ``a_n``)."""
        mine, other = (re.fullmatch(r"(.*[_({]\{?)([a-z])([)}]*)", name) for name in (self.head, head))
        if not mine or not other or (mine[1], mine[3]) != (other[1], other[3]):
            return self
        tokens = [re.findall(r"\\[a-zA-Z]+|[a-zA-Z]", part) for part in self.parts]
        if any(other[2] in letters for letters in tokens):
            return self

        def change(part: str) -> str:
            return re.sub(r"\\[a-zA-Z]+|[a-zA-Z]", lambda m: other[2] if m.group() == mine[2] else m.group(), part)

        return Chain(head, [*map(change, self.parts)], [*map(change, self.said)], self.exact)


def _named(text: str) -> bool:
    return _NAME.fullmatch(text) is not None or _NAMES.fullmatch(text) is not None


# ---- inequalities ------------------------------------------------------------------------------------------------

_FLIPPED = re.compile(r"([\[\](])([^\[\]]*[,;][^\[\]]*)([\[\])])")
_LESS, _GREATER = ("<", r"\le"), (">", r"\ge")


def usual_brackets(text: str) -> str:
    """``]a,b[`` as ``(a,b)``."""

    def turned(match: re.Match[str]) -> str:
        if match[1] != "]" and match[3] != "[":
            return match.group()
        return f"{'(' if match[1] == ']' else match[1]}{match[2]}{')' if match[3] == '[' else match[3]}"

    return r"\cup ".join(_FLIPPED.sub(turned, part) for part in split_unions(text))


def split_unions(text: str) -> list[str]:
    r"""The parts between ``\cup``, whatever brackets are around: a bracket that is turned outward opens none."""
    return [part.strip() for part in re.split(r"\\cup(?![a-zA-Z])", text)]


def solutions(text: str) -> tuple[str, str] | None:
    """The variable of inequalities, any of which may hold (``x<2, x>3``), and where they do, as a union of intervals;
    None for anything else."""
    found = [_interval(item) for item in split(text, ",")[0]]
    names = {part[0] for part in found if part}
    return None if None in found or len(names) != 1 else (names.pop(), r"\cup ".join(part[1] for part in found if part))


def _interval(text: str) -> tuple[str, str] | None:
    parts, signs = split(text, *_LESS, *_GREATER, "=", r"\ne", r"\approx")
    if not all(parts) or not signs:
        return None
    if all(sign in _GREATER for sign in signs):
        parts, signs = parts[::-1], [_LESS[_GREATER.index(sign)] for sign in signs[::-1]]
    if not all(sign in _LESS for sign in signs):
        return None
    names = [re.fullmatch(_SYMBOL + rf"{_INDEX}*", part) is not None for part in parts]
    start = end = None
    if len(parts) == 3 and names[1]:
        name, start, end = parts[1], (parts[0], signs[0]), (parts[2], signs[1])
    elif len(parts) == 2 and names[0]:
        name, end = parts[0], (parts[1], signs[0])
    elif len(parts) == 2 and names[1]:
        name, start = parts[1], (parts[0], signs[0])
    else:
        return None
    low = r"(-\infty" if start is None else f"{'(' if start[1] == '<' else '['}{start[0]}"
    high = r"\infty)" if end is None else f"{end[0]}{')' if end[1] == '<' else ']'}"
    return bare_key(name), f"{low},{high}"
