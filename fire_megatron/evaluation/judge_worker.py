"""The process that judges: reads JSON a line, first the CPU seconds that a judgement may take, then pairs of ``[right,
given]`` or ``[right, response, "math-verify"]``; answers ``true`` or ``false``.

Algebra on what a model wrote may take forever or all memory, within C code that no Python signal handler interrupts.
Here that costs one process: it ends itself when a judgement has used its CPU time, whatever else the machine does, so
that a verdict depends on load as little as it can. ``Judge`` (judge.py) starts and restarts it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import resource
import signal
import sys
from types import ModuleType

from fire_megatron.evaluation.equality import equal

MEMORY = 4 * 2**30
"""Address space, bytes."""
READY = "ready"
PUBLISHED = "math-verify"
"""Third in a line where math-verify's own verdict on a whole response is asked for."""


def _limit(seconds: float) -> None:
    """End this process after so much CPU time from now; 0 takes that back. Nobody catches the signal."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _algebra(right: str, given: str, *, seconds: float) -> bool:
    """Whether two LaTeX expressions are equal; False for what is no mathematics, on which sympy raises many kinds."""
    try:
        return _late("algebra", seconds).equal(right, given)
    except (Exception, RecursionError, MemoryError):
        return False


@functools.cache
def _late(name: str, seconds: float) -> ModuleType:
    """A module of this package that imports sympy, which takes a second: most answers need none."""
    _limit(0)
    module = importlib.import_module(f"fire_megatron.evaluation.{name}")
    _limit(seconds)
    return module


def _verdict(right: str, given: str, *how: str, seconds: float) -> bool:
    _limit(seconds)
    try:
        if PUBLISHED in how:
            return _late("algebra", seconds).published_verdict(right, given)
        return equal(right, given, functools.partial(_algebra, seconds=seconds))
    except (Exception, RecursionError, MemoryError):
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
        print(json.dumps(_verdict(*json.loads(line), seconds=seconds)), file=answers, flush=True)


if __name__ == "__main__":
    main()
