"""One way of writing for answers that are only written differently. What comes out is still LaTeX."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

# ---- characters beyond ASCII -------------------------------------------------------------------------------------

_SIGNS = {
    "−": "-", "–": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/",
    "∕": "/", "⁄": "/", "°": r"^{\circ}", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ",
    "⩾": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ", "∈": r"\in ", "√": r"\sqrt ",
    "≈": r"\approx ", "∅": r"\emptyset ", "±": r"\pm ", "∓": r"\mp ", "′": "'", "’": "'", "⟨": "(", "⟩": ")",
    "Ω": r"\Omega ", "Å": r"\AA ", "ℏ": r"\hbar ", "∠": r"\angle ", "△": r"\triangle ", "∼": r"\sim ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "…": r"\ldots ", "→": r"\to ", "✓": "",
    "✔": "", "✅": "", "■": "", "□": "", "∎": "", "µ": "µ", "\0": "",
}  # fmt: skip
_SETS = dict(zip("ℝℤℕℚℂ", "RZNQC", strict=True))


def _ascii(match: re.Match[str]) -> str:
    """A run of characters beyond ASCII. Those raised or lowered together are one exponent or index."""
    written, raised, sign = "", "", ""
    for character in match.group():
        kind = unicodedata.decomposition(character).rpartition(">")[0]
        now = {"<super": "^", "<sub": "_"}.get(kind, "")
        if now != sign:
            written += f"{sign}{{{raised}}}" if sign else ""
            raised, sign = "", now
        if now:
            raised += unicodedata.normalize("NFKC", character).replace("−", "-")
        elif kind == "<fraction":
            top, _, below = unicodedata.normalize("NFKC", character).partition("⁄")
            written += rf"\frac{{{top}}}{{{below}}}"
        else:
            written += _sign(character)
    return written + (f"{sign}{{{raised}}}" if sign else "")


def _sign(character: str) -> str:
    if character in _SETS:
        return rf"\mathbb{{{_SETS[character]}}}"
    if character in _SIGNS:
        return _SIGNS[character]
    category, plain = unicodedata.category(character), unicodedata.normalize("NFKC", character)
    if category in ("Sc", "Cf"):  # currency; invisible
        return ""
    if category in ("Zs", "Zl", "Zp"):
        return " "
    name = re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (?:FINAL )?(\w+)", unicodedata.name(plain, "")[:60])
    if name:
        letter = name[2].lower().replace("lamda", "lambda")
        return rf"\{letter if name[1] == 'SMALL' else letter.capitalize()} "
    return plain if plain.isascii() else character


# ---- commands ----------------------------------------------------------------------------------------------------

_WRAPPER = re.compile(
    r"\\+(?P<kept>boxed|fbox|framebox|underline|uuline|emph|ensuremath|bm|boldsymbol|pmb|hbox|displaystyle|mathstrut"
    r"|mathop|mathord|underbrace|overbrace|bf|rm|textcolor|color|colorbox|fcolorbox|hspace|vspace|phantom|hphantom|tag"
    r"|label|large|Large|LARGE|huge|Huge|normalsize|small)\*?(?![a-zA-Z])\s*"
)
_DROPPED = {"textcolor": 1, "color": 1, "colorbox": 1, "fcolorbox": 2, "hspace": 1, "vspace": 1, "phantom": 1,
    "hphantom": 1, "tag": 1, "label": 1}  # fmt: skip
"""Arguments of a command that are not shown as part of the answer."""
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|sqrt|log|ln|exp"
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


def closing(text: str, start: int) -> int:
    """Index of the brace that closes the one at ``start``; -1 when none does."""
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return start + match.start()
    return -1


def _unwrapped(text: str) -> str:
    """Without commands that change how an answer looks and not what it says."""
    place = 0
    while match := _WRAPPER.search(text, place):
        place, end = match.start(), match.end()
        for _ in range(_DROPPED.get(match["kept"], 0)):
            if text[end : end + 1] == "{" and closing(text, end) > 0:
                end = closing(text, end) + 1
        inner = closing(text, end) if text[end : end + 1] == "{" else -1
        content = f" {text[end + 1 : inner]} {text[inner + 1 :]}" if inner > 0 else f" {text[end:]}"
        text = text[:place] + content
    return text


def _recurring(match: re.Match[str]) -> str:
    """The fraction that a recurring decimal is."""
    whole, fixed, period = match.groups()
    ends = 10 ** len(fixed)
    value = Fraction(int(whole + fixed or "0"), ends) + Fraction(int(period), ends * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _scaled(match: re.Match[str]) -> str:
    rest = rf"\text{{{match['rest']}}}" if (match["rest"] or "").strip() else ""
    return rf" \times 10^{{{_SCALES[match['scale'] or match['word']]}}}{rest}"


def _matrix(match: re.Match[str]) -> str:
    r"""``pmatrix`` for every matrix in round or square brackets, whatever its spacing; ``vmatrix`` is a determinant."""
    rows = re.sub(r"\\hline|\s+", " ", re.sub(r"\\\\\s*\[[^\]]*\]|\\cr(?![a-z])", r"\\\\", match["rows"]))
    rows = re.sub(r"(?:\s*\\\\)+\s*$", "", rows).strip()
    bars = match["open"] == "|" or match["kind"] in ("vmatrix", "Vmatrix")
    kind = "vmatrix" if bars else "pmatrix"
    return rf"\begin{{{kind}}}{rows}\end{{{kind}}}"


def _nested(match: re.Match[str]) -> str:
    r"""``[[1,2],[3,4]]`` as a matrix."""
    rows = re.findall(r"\[([^\[\]]*)\]", match.group()[1:-1])
    return r"\begin{pmatrix}" + r" \\ ".join(row.replace(",", " & ") for row in rows) + r"\end{pmatrix}"


_REWRITES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\?\$|\\(?:euro|pounds|pound|yen)(?![a-zA-Z])", ""),  # delimiters and currency
        (r"\\(?:checkmark|blacksquare|square|Box|qed|qedsymbol)(?![a-zA-Z])", ""),
        (r"^\s*\\(?:therefore|Rightarrow|implies)(?![a-zA-Z])", ""),
        (r"\\text\s*\{\s*,\s*\}", "{,}"),
        (r",\\!\s*", "{,}"),  # no comma of a list
        (r"\\!", ""),
        (r"(?<=\d)(?:\{,\}|\\[,;:]|\\ ) ?(?=\d{3}(?!\d))", ""),  # other separators of thousands
        (r"\\(?:left|right)\s*\.", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?|textstyle|limits|nolimits|middle)(?![a-zA-Z])", ""),
        (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-zA-Z])|\\(?:thin|med|thick)space(?![a-zA-Z])", " "),
        (r"\\(?:lbrack|rbrack)(?![a-zA-Z])\s*", lambda m: "[" if m.group().startswith("\\l") else "]"),
        (
            r"(?P<open>[\[(|]?)\s*\\begin\s*\{(?P<kind>[bBpvV]?(?:small)?matrix|array)\}(?(kind)\s*(?:\{[lcr|\s]*\})?)"
            r"(?P<rows>(?:(?!\\begin).)*?)\\end\s*\{(?P=kind)\}\s*[\])|]?",
            _matrix,
        ),
        (r"\[\s*(?:\[[^\[\]]*\]\s*,\s*)+\[[^\[\]]*\]\s*\]", _nested),
        (r"^\s*(?:=|\\(?:approx|simeq|sim|cong)(?:eq)?(?![a-zA-Z]))\s*", ""),
        (r"\\(?:simeq|cong|thickapprox|approxeq|doteq)(?![a-zA-Z])", r"\\approx"),
        (r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset"),
        (r"(?<![\d.])(\d{0,15})\.(\d{0,15})\\(?:overline|bar|dot)\s*\{?(\d{1,15}+)\}?", _recurring),
        (r"\\(?:langle|lparen)(?![a-zA-Z])", "("),
        (r"\\(?:rangle|rparen)(?![a-zA-Z])", ")"),
        (r"\\[lr]?vert(?![a-zA-Z])|\\mid(?![a-zA-Z])", "|"),
        (r"\\[dtcs]frac(?![a-zA-Z])", r"\\frac"),
        (r"\{([^{}]*)\\over(?![a-zA-Z])\s*([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d|\\pi)\s*\{", r"\\frac{\1}{"),
        (r"\\frac\s*\{([^{}]*)\}\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"\\(?:geqslant|geqq|geq)(?![a-zA-Z])|>=", r"\\ge"),
        (r"\\(?:leqslant|leqq|leq)(?![a-zA-Z])|<=", r"\\le"),
        (r"\\[lg]t(?![a-zA-Z])", lambda m: "<" if m.group() == r"\lt" else ">"),
        (r"\\neq(?![a-zA-Z])", r"\\ne"),
        (r"\\(?:backslash|smallsetminus)(?![a-zA-Z])", r"\\setminus"),
        (r"\\(?:Real|Reals|R)(?![a-zA-Z])", r"\\mathbb{R}"),
        (r"\\math(?:bf|it|sf|normal)\s*\{\s*(\w)\s*\}|\\mathrm\s*\{\s*([ie])\s*\}", r" \1\2"),  # variables
        (r"\\(?:text|math)(?:rm|bf|it|sf|tt|sc|up|md|normal)\s*\{|\\(?:mbox|operatorname|text)\*?\s*\{", r"\\text{"),
        (r"\\text\s*\{\s*\}", ""),
        (r"\\text\s*\{\s*(-?[\d.,/]*\d)\s*\}", r" \1 "),
        (r"^\\text\s*\{\s*(-?[\d.,]*\d) ([a-zA-Z][^{}\d]*)\}$", r"\1 \\text{\2}"),
        (r"^\\\{\s*([a-zA-Z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?[|:]\s*((?:[^a-zA-Z{}]|\1|\\[lg]e(?![a-z]))+)\\\}$", r"\2"),
        (r"[.\s]+\}$", "}"),
        (r"(?i)\\%|\\text\s*\{\s*(?:\\?%|percent|percentage|pct)\s*\}|\b(?:percent|percentage|pct)\b", r"\\%"),
        (r"[,;]?\s*(?:\\text\{[\s,;]*(?:and|or)[\s,]*\}|\b(?:and|or)\b)", ","),
        (
            rf"(?<=[\d}}])\s*(?:\\text\{{\s*(?P<scale>{'|'.join(_SCALES)})\b(?P<rest>[^{{}}]*)\}}"
            rf"|\b(?P<word>{'|'.join(_SCALES)})\b)",
            _scaled,
        ),
        (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![a-zA-Z])", r"^{\\circ}"),
        (r"(?<=[\d}])\^\s*(?:o|\{o\})(?![a-zA-Z])", r"^{\\circ}"),
        (r"(?<=[A-Za-z)])('+)", lambda m: r"^{" + r"\prime" * len(m[1]) + "}"),
        (r"\b(?:np|numpy|math)\.(?=[a-z])", ""),
        (r"\*\*", "^"),
        (rf"(?<![\\a-zA-Z])({_FUNCTIONS})(?![a-zA-Z])", r"\\\1"),
        (r"(?<=\d)(sqrt)(?![a-zA-Z])", r"\\\1"),
        (r"\\log\s*_\s*(?:e|\{\s*e\s*\})(?![a-zA-Z])", r"\\ln"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<=\d)\.(?=\s*(?:$|[-+*/,)\]]))", ""),  # 1./3
        (r"(?<![\w.\\^])(\d+\.?\d*|\.\d+)[eE]([-+]?)0*(\d+)(?![\w.])", r"\1 \\times 10^{\2\3}"),
        (r"\^\{\+(?=\d+\})", "^{"),
        (r"\s+", " "),
        (r"(?<![\d.^_])(\d{1,3}) (\d{3})(?: (\d{3}))?(?: (\d{3}))?(?!\d| \d)", r"\1\2\3\4"),
    )
)


def normalise(answer: str) -> str:
    """One way of writing for what is only written differently: delimiters, spacing, fonts, frames, matrices, signs
    beyond ASCII, Python forms of functions and numbers."""
    text = _unwrapped(re.sub(r"[^\x00-\x7f]+|\0", _ascii, answer))
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(" .,;:\\")
    while text.startswith("{") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def key(answer: str) -> str:
    """Equal for answers that are the same after one way of writing."""
    return bare_key(normalise(answer))


def without_text_commands(text: str) -> str:
    r"""``\text{...}`` replaced by what is in it."""
    return re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)


def bare_key(text: str) -> str:
    """Of a normalised answer: equal for those that differ by spaces, text commands and needless braces. A space between
    digits counts."""
    bare = re.sub(r"(?<=\\)([a-zA-Z]+) (?=[a-zA-Z])", r"\1\\ ", without_text_commands(text))  # it ends a command
    return re.sub(r"(?<=[_^])\{(\w)\}", r"\1", re.sub(r"(?<!\d) | (?!\d)", "", bare))
