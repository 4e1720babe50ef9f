"""Equality of mathematical expressions: read by latex2sympy, compared by sympy and at points, sets by math-verify.

Importing this takes a second or two, so only the process that judges does it, when a pair of answers needs it.
"""

from __future__ import annotations

import functools
import logging
import re
from fractions import Fraction
from typing import Any

import sympy
from latex2sympy2_extended import latex2sympy2
from math_verify import parse, verify
from sympy import Basic, Expr, FiniteSet, Interval, MatrixBase, Tuple

from fire_megatron.evaluation.numbers import ROUNDING, close

logging.disable(logging.CRITICAL)  # of parsers, which tell what they cannot read

_READING = latex2sympy2.NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)
"""Units are ours: the package takes letters for them that are variables (``6m`` is 6 to it)."""
_SYMBOLS = latex2sympy2.ConversionConfig(lowercase_symbols=False)
_ANGLE = re.compile(r"(\d+(?:\.\d+)?|\\frac\s*\{\d+\}\s*\{\d+\})\s*\^\{\\circ\}")
_DIGITS = 30
"""Significant digits to which values are computed first."""
_LARGEST = 10**6
"""Digits before the point beyond which numbers are not computed to the last."""
_POINTS = [sympy.Rational(*pair) for pair in ((173, 127), (-229, 311), (941, 113), (-1327, 211), (379, 1019), (4, 1))]
_DELAYED = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Derivative, sympy.Limit)
_STEP = sympy.Rational(331, 257)
_EXACT, _ROUNDED = sympy.Float("1e-20"), sympy.Float(float(ROUNDING))
"""How far values that are the same may be apart, as a part of the larger; with a rounded one among them."""


@functools.lru_cache(maxsize=256)
def read(text: str) -> Any:
    """What LaTeX says, with radians for degrees. Letters keep their case.

    The package reads a number before a parenthesis as a mixed number (``2(3)`` is 5 to it) and I as the imaginary unit.

    Raises:
        Exception: of many kinds, on what is no mathematics.
    """
    text = _ANGLE.sub(r"(\\frac{\1 \\pi}{180})", text)
    text = re.sub(r"((?<![_^\w.\\{])\d[\d.]*)\s*(?=\()|(\))\s*(?=\(|\d|\\frac)", r"\1\2 \\cdot ", text)
    text = re.sub(r"\\[a-zA-Z]+(?:\s*\{[^{}]*\})?|I", lambda m: r"\text{I}" if m.group() == "I" else m.group(), text)
    return latex2sympy2.latex2sympy(text, normalization_config=_READING, conversion_config=_SYMBOLS)


def equal(right: str, given: str) -> bool:
    """Whether two LaTeX expressions are equal.

    Raises:
        Exception: of many kinds, on what is no mathematics.
    """
    return _same(*_uniform(read(right), read(given)))


def published_verdict(right: str, response: str) -> bool:
    """math-verify's own verdict on a response, by its defaults, which published scores are made with."""
    gold, answer = (parse(text, parsing_timeout=None) for text in (right if "$" in right else f"${right}$", response))
    return bool(verify(gold, answer, timeout_seconds=None))


def _uniform(a: Any, b: Any) -> tuple[Any, Any]:
    """Both with the imaginary unit for ``i``, and variables that are real unless one holds that unit. The parser takes
    ``i`` for a variable.

    Indices of sums and products are bound, and stay variables. So do those of inequalities and of intervals.
    """
    a, b = (_map(side, lambda x: x.subs({s: sympy.I for s in x.free_symbols if s.name == "i"})) for side in (a, b))
    real = None if any(side.has(sympy.I) for side in (a, b) if isinstance(side, Basic)) else True

    def alike(x: Expr) -> Expr:
        return x.xreplace({s: sympy.Symbol(s.name, real=real) for s in x.atoms(sympy.Symbol)})

    return _map(a, alike), _map(b, alike)


def _map(expression: Any, change: Any) -> Any:
    """Change an expression, or those in an equation, a tuple, a set or a matrix."""
    if isinstance(expression, sympy.Equality):
        return sympy.Eq(*(_map(side, change) for side in expression.args), evaluate=False)
    if isinstance(expression, Tuple | FiniteSet):
        return expression.func(*(_map(item, change) for item in expression.args))
    if isinstance(expression, MatrixBase):
        return expression.applyfunc(change)
    return change(expression) if isinstance(expression, Expr) else expression


def _same(a: Any, b: Any) -> bool:
    a, b = (side.doit() if isinstance(side, sympy.MatrixExpr | MatrixBase) else side for side in (a, b))
    if isinstance(a, MatrixBase) or isinstance(b, MatrixBase):
        alike = isinstance(a, MatrixBase) and isinstance(b, MatrixBase) and a.shape == b.shape
        return alike and all(map(_same, a.flat(), b.flat()))
    if isinstance(a, sympy.Equality) and isinstance(b, sympy.Equality) and _plain(a) and _plain(b):
        return _same_equation(a, b)
    if isinstance(a, Interval) and isinstance(b, Interval):
        opened = (a.left_open, a.right_open) == (b.left_open, b.right_open)
        return opened and _same(a.start, b.start) and _same(a.end, b.end)
    if isinstance(a, Expr) and isinstance(b, Expr):
        return _same_value(a, b)
    return bool(verify(a, b, timeout_seconds=None, allow_set_relation_comp=True))


def _plain(equation: Any) -> bool:
    return all(isinstance(side, Expr) for side in equation.args)


def _same_equation(a: Any, b: Any) -> bool:
    """Whether one is the other times a number that is not 0."""
    sides = [sympy.fraction(sympy.together(sympy.expand(e.lhs - e.rhs)))[0] for e in (a, b)]
    if any(side.is_zero for side in sides):
        return False
    ratio = sympy.simplify(sides[0] / sides[1])
    return not ratio.free_symbols and ratio.is_finite is not False and not ratio.is_zero


def _same_value(a: Expr, b: Expr) -> bool:
    rounded = a.has(sympy.Float) + b.has(sympy.Float)
    a, b = (side.replace(lambda x: isinstance(x, sympy.UnevaluatedExpr), lambda x: x.args[0]) for side in (a, b))
    a, b = (side.doit() if side.has(*_DELAYED) else side for side in (a, b))
    names = sorted((a.free_symbols | b.free_symbols), key=lambda s: s.name)
    if not names:
        return _same_number(a, b, rounded)
    met = _meet(a, b, names, rounded)
    return met if met is not None else bool(sympy.simplify((a - b).doit()) == 0)


def _meet(a: Expr, b: Expr, names: list[Any], rounded: int) -> bool | None:
    """Whether the values agree at points of the reals, and exist at the same ones; None where too few do.

    Variables are positive in what a student writes as often as not, so sympy proves little of such equalities
    (``\\sqrt{1/n}`` is ``1/\\sqrt{n}`` for positive n alone); values settle them.
    """
    met = 0
    for number, start in enumerate(_POINTS):
        turns = [start + place * _STEP * (-1) ** (number * place) for place in range(len(names))]
        values = [_complex(side.xreplace(dict(zip(names, turns, strict=True))).doit()) for side in (a, b)]
        known = [value is not None for value in values]
        if not all(known):
            if any(known) and met:
                return None
            continue
        imaginary = a.has(sympy.I) or b.has(sympy.I)
        real = [imaginary or abs(sympy.im(value)) <= abs(value) * _EXACT for value in values]
        if real[0] != real[1]:
            return False
        if real[0]:
            size = max(map(abs, values))
            if abs(values[0] - values[1]) > size * (_ROUNDED if rounded else _EXACT):
                return False
            met += 1
    return True if met > 1 else None


def _complex(value: Any) -> Any:
    """A value to :data:`_DIGITS`; None where there is none."""
    number = sympy.N(value, _DIGITS)
    return number if number.is_number and number.is_finite and not number.has(sympy.nan, sympy.zoo) else None


def _same_number(a: Expr, b: Expr, rounded: int) -> bool:
    """Exactly, however large or small, or to :data:`ROUNDING` where one is rounded."""
    values = _complex(a), _complex(b)
    if None in values:
        return sympy.oo in (a := a.doit(), -a) and bool(a == b.doit())
    x, y = values
    if rounded and all(value.is_real for value in values):
        return close(Fraction(str(x)), Fraction(str(y)), rounded=rounded)
    size = max(abs(x), abs(y))
    if abs(x - y) > size * (_ROUNDED if rounded else _EXACT):
        return False
    if rounded or not size:
        return True
    digits = max(0, int(sympy.floor(sympy.log(size, 10))))
    if digits > _LARGEST:
        return bool(a.doit() == b.doit())
    a, b = a.doit(), b.doit()
    if a.is_Rational and b.is_Rational:
        return bool(a == b)
    x, y = (sympy.N(side, digits + 2 * _DIGITS) for side in (a, b))
    return bool(abs(x - y) <= max(abs(x), abs(y)) * sympy.Float(10) ** (-digits - _DIGITS))
