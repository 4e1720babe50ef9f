"""The process that judges: reads JSON a line, first the CPU seconds that a judgement may take, then pairs of ``[right,
given]``; answers ``true`` or ``false``.

Algebra on what a model wrote may take forever or all memory, within C code that no Python signal handler interrupts.
Here that costs one process: it ends itself when a judgement has used its CPU time, whatever else the machine does, so
that a verdict depends on load as little as it can. ``Judge`` (judge.py) starts and restarts it.
"""

from __future__ import annotations

import cmath
import contextlib
import functools
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

from fire_megatron.evaluation.answers import ROUNDING, equal

MEMORY = 4 * 2**30
"""Address space, bytes."""
READY = "ready"
_SMALL = 1e-3
_AGREES = 1e-6


@functools.cache
def _math_verify() -> tuple[Any, Any, Any]:
    """The package's ``parse`` with our settings, and its ``verify``. Units are ours: it takes letters for them that are
    variables (``6m`` is 6 to it). So are timeouts, which it sets with a signal of the main thread."""
    import math_verify
    import sympy
    from latex2sympy2_extended import NormalizationConfig

    logging.disable(logging.CRITICAL)
    config = math_verify.LatexExtractionConfig(
        boxed_match_priority=-1,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
        ),
    )

    @functools.lru_cache(maxsize=256)
    def parse(text: str) -> list[Any]:
        options: dict[str, Any] = {"fallback_mode": "no_fallback", "extraction_mode": "first_match"}
        return math_verify.parse(f"${text}$", [config], parsing_timeout=None, **options)

    return parse, functools.partial(math_verify.verify, timeout_seconds=None, allow_set_relation_comp=True), sympy


def _uniform(a: Any, b: Any, sympy: Any) -> tuple[Any, Any]:
    """Both with the imaginary unit for ``i``, and variables that are real unless one holds that unit. The parser takes
    ``i`` for a variable in places, and variables for real ones or not, by what stands around them: two texts would have
    nothing in common.

    Indices of sums and products are bound, and stay variables. So do those of inequalities and of intervals.
    """
    imaginary = functools.partial(
        _map, change=lambda x: x.subs({s: sympy.I for s in x.free_symbols if s.name == "i"}), sympy=sympy
    )
    a, b = imaginary(a), imaginary(b)
    real = None if any(side.has(sympy.I) for side in (a, b) if isinstance(side, sympy.Basic)) else True
    variables = functools.partial(
        _map,
        change=lambda x: x.xreplace({s: sympy.Symbol(s.name, real=real) for s in x.atoms(sympy.Symbol)}),
        sympy=sympy,
    )
    return variables(a), variables(b)


def _map(expression: Any, change: Callable[[Any], Any], sympy: Any) -> Any:
    """Change an expression, or those in an equation, a tuple or a set."""
    if isinstance(expression, sympy.Equality):
        return sympy.Eq(*(_map(side, change, sympy) for side in expression.args), evaluate=False)
    if isinstance(expression, sympy.Tuple | sympy.FiniteSet):
        return expression.func(*(_map(item, change, sympy) for item in expression.args))
    return change(expression) if isinstance(expression, sympy.Expr) else expression


def _limit(seconds: float) -> None:
    """End this process after so much CPU time from now; 0 takes that back. Nobody catches the signal."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _algebra(right: str, given: str, *, seconds: float) -> bool:
    """Whether math-verify finds two LaTeX expressions equal; False for what it cannot read."""
    if not _math_verify.cache_info().currsize:  # most answers need no algebra, and sympy takes a second to import
        _limit(0)
        _math_verify()
        _limit(seconds)
    parse, verify, sympy = _math_verify()
    a, b = list(parse(right)), list(parse(given))
    if not a or not b:
        return False
    a[0], b[0] = _uniform(a[0], b[0], sympy)
    values = _value(a[0], sympy), _value(b[0], sympy)
    if None in values:
        return bool(verify(a, b))
    x, y = values
    difference, size = abs(x - y), max(abs(x), abs(y))
    if a[0].has(sympy.Float) or b[0].has(sympy.Float):
        return bool(difference <= float(ROUNDING) * min(1, size)) or (size >= _SMALL and bool(verify(a, b)))
    # math-verify rounds to the sixth decimal place, where every Planck constant is equal to every other
    return (size >= _SMALL or difference <= _AGREES * size) and bool(verify(a, b))


def _value(expression: Any, sympy: Any) -> complex | None:
    """The number that an expression is; None for what has variables or is not finite."""
    if not isinstance(expression, sympy.Expr) or not expression.is_number:
        return None
    try:
        value = complex(sympy.N(expression.doit()))
    except (TypeError, ValueError, OverflowError):
        return None
    return value if cmath.isfinite(value) else None


def _verdict(right: str, given: str, seconds: float) -> bool:
    _limit(seconds)
    try:
        return equal(right, given, functools.partial(_algebra, seconds=seconds))
    except (Exception, RecursionError, MemoryError):  # sympy raises many kinds on what is no mathematics
        return False
    finally:
        _limit(0)


def main() -> None:
    """Judge until the other end closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for chatter in (1, 2):  # parsers print what they cannot read
        os.dup2(nowhere, chatter)
    with contextlib.suppress(ValueError, OSError):  # a lower limit stands
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    seconds = json.loads(sys.stdin.readline())
    print(json.dumps(READY), file=answers, flush=True)
    for line in sys.stdin:
        right, given = json.loads(line)
        print(json.dumps(_verdict(right, given, seconds)), file=answers, flush=True)


if __name__ == "__main__":
    main()
