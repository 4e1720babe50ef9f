"""Two synthetic domains whose answers a program checks, with worked solutions to learn from.

``math`` adds four two-digit numbers, digit by digit with carries, one number at a time in any order::

    47+85+36+12=      85+36:11,12=121;+12:03,03=133;+47:10,08=180#180

``code`` runs five operations on a list of five digits and shows the list after one or two operations at a time::

    38152|rsfxi=      r25183;sf21835;x51832;i62943#62943

What comes next is fixed everywhere but at forks: which number to add, whether to take one operation or two. A response
is right when it ends by itself and what follows its one ``#`` is the problem's result; the way there is not looked at.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

NUMBERS, LIST_LENGTH, PROGRAM_LENGTH = 4, 5, 5
ALPHABET = "0123456789+:,=;#|rsfxi"
"""Every character of prompts and responses; each is a token."""
MAX_NEW_TOKENS = 56
"""Longer than any worked solution with its end, which take up to 48 tokens."""

OPERATIONS: Mapping[str, Callable[[str], str]] = {
    "r": lambda digits: digits[::-1],
    "s": lambda digits: digits[1] + digits[0] + digits[2:],
    "f": lambda digits: digits[1:] + digits[0],
    "x": lambda digits: digits[-1] + digits[1:-1] + digits[0],
    "i": lambda digits: "".join(str((int(digit) + 1) % 10) for digit in digits),
}
"""Reverse, swap the first two, first to the end, exchange the ends, add one to each modulo ten."""


@dataclass(frozen=True)
class Domain:
    """Problems of one kind."""

    problem: Callable[[random.Random], str]
    """Draws a prompt."""
    solution: Callable[[str, random.Random], str]
    """A worked solution of a prompt, its forks drawn at random."""
    result: Callable[[str], str]
    """What must follow ``#``."""


def _sum_problem(rng: random.Random) -> str:
    return "+".join(str(number) for number in rng.sample(range(10, 100), NUMBERS)) + "="


def _sum_result(problem: str) -> str:
    return f"{sum(map(int, problem.rstrip('=').split('+'))):03d}"


def _sum_solution(problem: str, rng: random.Random) -> str:
    numbers = list(map(int, problem.rstrip("=").split("+")))
    rng.shuffle(numbers)
    total, steps = numbers[0], []
    for number in numbers[1:]:
        units = total % 10 + number % 10
        tens = total // 10 % 10 + number // 10 + units // 10
        total += number
        steps.append(f"+{number}:{units:02d},{tens:02d}={total:03d}")
    return f"{numbers[0]}" + ";".join(steps) + f"#{total:03d}"


def _program_problem(rng: random.Random) -> str:
    digits = "".join(rng.choice("0123456789") for _ in range(LIST_LENGTH))
    return digits + "|" + "".join(rng.choice(list(OPERATIONS)) for _ in range(PROGRAM_LENGTH)) + "="


def _apply(digits: str, program: str) -> str:
    for name in program:
        digits = OPERATIONS[name](digits)
    return digits


def _program_result(problem: str) -> str:
    return _apply(*problem.rstrip("=").split("|"))


def _program_solution(problem: str, rng: random.Random) -> str:
    digits, program = problem.rstrip("=").split("|")
    steps, place = [], 0
    while place < len(program):
        taken = program[place : place + rng.choice((1, 2))]
        digits, place = _apply(digits, taken), place + len(taken)
        steps.append(taken + digits)
    return ";".join(steps) + f"#{digits}"


DOMAINS: Mapping[str, Domain] = {
    "math": Domain(_sum_problem, _sum_solution, _sum_result),
    "code": Domain(_program_problem, _program_solution, _program_result),
}


def is_right(label: str, problem: str, response: str, *, truncated: bool) -> bool:
    """Whether a response (without its end token) gives the problem's result.

    ``truncated``: it was cut before it ended by itself, and so is wrong.
    """
    return not truncated and response.split("#")[1:] == [DOMAINS[label].result(problem)]


def problems(label: str, count: int, *, seed: int, without: frozenset[str] = frozenset()) -> list[str]:
    """Distinct problems, the same for the same arguments; none of ``without``."""
    rng = random.Random(f"{label} {seed}")
    found: dict[str, None] = {}
    while len(found) < count:
        problem = DOMAINS[label].problem(rng)
        if problem not in without:
            found[problem] = None
    return list(found)
