r"""Units after a number, which the judge ignores.

In a text command (``\text{cm}^2``, ``\mathrm{erg}\cdot\mathrm{s}^{-1}``) any noun is one, outside of it only what the
table here knows: ``2xy`` is a product, not two of the unit xy. Words that change what the number says (``or more``,
``million``, ``is not possible``) make no unit anywhere.
"""

from __future__ import annotations

import re


def _table(words: str) -> list[str]:
    return words.split()


_PREFIXES = ("", *"TGMkhdcmunpfµμ")
_PREFIXED = _table("m g s A K N J W V C T F H L l G Hz Pa eV pc mol cal bar rad sr Wb lm lx Bq Gy Sv Wh ohm")
_SYMBOLS = frozenset(
    _table("""
        h d hr hrs min mins sec secs yr yrs ft in yd mi lb lbs oz mph kph rpm ly AU au amu erg ergs dyn dyne dynes
        atm torr psi mmHg deg degs dB ppm USD EUR Da cc ha kgf sq cu per Nm Ns Js gal pt qt cd
    """)
)
_STEMS = _table("""
    meter metre gram second minute hour day week month year foot yard mile pound ounce ton tonne dollar cent euro
    liter litre joule newton watt volt ampere amp kelvin coulomb tesla gauss farad ohm pascal mole radian parsec
    electronvolt lightyear degree unit atmosphere calorie angstrom steradian knot acre gallon inch
""")
_NAMES = frozenset(
    [prefix + stem + end for stem in _STEMS for end in ("", "s") for prefix in _table("kilo centi milli micro nano")]
    + [stem + end for stem in _STEMS for end in ("", "s")]
    + _table("inches feet hertz henry henries square cubic solar mass masses luminosities radii light")
)
"""In lower case."""
_IN_TEXT = _SYMBOLS | {prefix + unit for prefix in _PREFIXES for unit in _PREFIXED}
_BARE = frozenset(
    {unit for unit in _SYMBOLS if len(unit) > 1} - {"cd", "ha", "pt"}
    | {unit for unit in _PREFIXED if len(unit) > 1}
    | {prefix + unit for prefix in "GMkmuµμ" for unit in _PREFIXED if unit not in "msgl"}
    | {prefix + unit for prefix in "kdcmunpfµμ" for unit in "mgs"} - {"ks", "dg", "ds", "cg", "cs", "pg"}
    | set(_table("ml dl dL cL nT nF pF nA nC pC nL"))
)
"""Symbols that are rather units than products of variables."""
_LETTERS = frozenset("msgKNJW")
"""Units of one letter that may stand outside of a text command where a space or another unit says that they are one."""
_OTHER_LETTERS = frozenset("hALCVT")
"""Those that need another unit: ``km/h``."""
REFUSED = frozenset(
    _table("""
        or and not no nor none more less fewer than least most up is are was if when where unless except but only
        hundred hundreds thousand thousands million millions billion billions trillion trillions dozen dozens percent
        percentage half halves third thirds quarter quarters tenths hundredths thousandths pi infinity infinite
        infinitely infty possible impossible false plus minus times over factorial squared cubed root mod modulo base
        binary hexadecimal gcd lcm max sin cos tan cot csc log exp sqrt any all every both either undefined unknown
        incorrect wrong even odd approximately about almost negative
    """)
)
"""Words that say more about a number than of what it is."""
_PREPOSITIONS = frozenset(_table("of in by to on a an"))
_LONGEST = 6
"""Words of a unit; more are a sentence."""

_POWER = r"\^\s*\{?\s*[-+]?\s*\d\s*\}?"
_TEXT = r"\\text\s*\{(?P<text>(?:[^{}]|\{[^{}]*\})*)\}"
_SEPARATOR = r"[\s/*]|\\cdot(?![A-Za-z])"
_SIGN = r"\\(?:Omega|AA)(?![A-Za-z])|[MLR]_\s*\{?\s*\\odot\s*\}?"
_WORD = r"[A-Za-zµμ]++"
_PREFIX = r"\\mu(?![A-Za-z])|(?<![\\A-Za-z])(?:[kMG]|\\text\s*\{[kMG]\})(?=\s*\\Omega)"
_TOKEN = re.compile(
    rf"(?P<separator>{_SEPARATOR})|(?P<prefix>{_PREFIX})|{_TEXT}|(?P<sign>{_SIGN})|(?P<word>{_WORD})|(?P<power>{_POWER})"
)
_ANONYMOUS = re.sub(r"\(\?P<\w+>", "(?:", _TEXT)
_TEXT_TAIL = re.compile(
    rf"(?<!_)(?:{_SEPARATOR}|(?:{_PREFIX})\s*(?=\\text|\\Omega)|{_ANONYMOUS}|(?<=\}})\s*{_POWER})++$"
)
_BARE_TAIL = re.compile(
    rf"(?<=[\d}}\s)\]A-Za-z])(?<!_)(?:{_SEPARATOR}|{_ANONYMOUS}|{_SIGN}|{_PREFIX}|(?<![\\A-Za-z]){_WORD}"
    rf"|(?<=[A-Za-z}}µμ])\s*{_POWER})++$"
)
_IN_WORDS = re.compile(
    r"(?P<word>(?:[A-Za-zµμ]|\\(?:AA|Omega|mu)(?![A-Za-z])\s*)++)\.?(?:\^?\{?[-+]?\d\}?)?|[\s/*()-]|\\cdot"
)
_DEGREES = re.compile(r"\^\{\\circ\}(?:\s*[CF](?![A-Za-z]))?")
_TRIGONOMETRY = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)")


_ARGUMENT = r"\{((?:[^{}\d]|\{[^{}]*\}|(?<=\^)\d)+)\}"
_QUOTIENT = re.compile(rf"\\frac\s*{_ARGUMENT}\s*{_ARGUMENT}\s*$")


def without_units(text: str, *, bare: bool) -> str:
    """The text without degrees and units at its end; ``bare``: also units outside of text commands. An answer is
    never all unit."""
    if not _TRIGONOMETRY.search(text):
        text = _DEGREES.sub("", text)
    text = text.strip()
    spread = _QUOTIENT.sub(r" \1 / \2", text)
    tail = (_BARE_TAIL if bare else _TEXT_TAIL).search(spread)
    if tail is None or not spread[: tail.start()].strip() or not _is_unit(spread, tail.start()):
        return text
    return spread[: tail.start()].strip()


def _is_unit(text: str, start: int) -> bool:
    """Whether the text from ``start`` on, all of it tokens that units have, is one."""
    tokens = list(_TOKEN.finditer(text, start))
    words = [token["word"] for token in tokens if token["word"]]
    named = any(token["text"] or token["sign"] for token in tokens)
    named = named or any(len(word) > 1 for word in words)
    if not words and not named:
        return False
    if not all(_in_text(token["text"]) for token in tokens if token["text"] is not None):
        return False
    singles = [word for word in words if len(word) == 1]
    if not all(word in _BARE or word.lower() in _NAMES for word in words if len(word) > 1):
        return False
    if not singles or (named and all(word in _LETTERS | _OTHER_LETTERS for word in singles)):
        return not (singles and text[start:].lstrip()[:1] == "/" and tokens[-1]["word"] == singles[0])
    if not all(word in _LETTERS for word in singles):
        return False
    spaced = text[start].isspace() or text[start - 1].isspace()
    divides = text[start:].lstrip()[:1] == "/"  # 1/N
    return not divides and (spaced or len(singles) > 1 or any(token["prefix"] for token in tokens))


def _in_text(content: str) -> bool:
    """Whether the content of a text command is a unit: a noun or two, or symbols."""
    words, place = [], 0
    while place < len(content):
        token = _IN_WORDS.match(content, place)
        if token is None:
            return False
        words += [token["word"]] if token["word"] else []
        place = token.end()
    return len(words) <= _LONGEST and all(_noun(word) for word in words)


def _noun(word: str) -> bool:
    if len(word) > 2:
        return word.lower() not in REFUSED
    return word in _IN_TEXT or word in _PREPOSITIONS or "\\" in word
