"""Kinds of numbers and texts that the fields of a recipe take."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema


@dataclass(frozen=True)
class Match:
    """Annotates a string in which a regular expression matches from start to end."""

    pattern: str
    meaning: str

    def accepts(self, text: str) -> bool:
        """Whether the pattern matches the whole string."""
        return re.fullmatch(self.pattern, text) is not None

    def __str__(self) -> str:
        return self.meaning

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler(source) | {"pattern": f"^(?:{self.pattern})$"}


MOST = 2**31 - 1
"""Stands for as many as there are."""
Count = Annotated[int, Ge(0), Le(MOST)]
Size = Annotated[int, Ge(1), Le(MOST)]
Seed = Annotated[int, Ge(0), Lt(2**31)]
MOST_SAMPLES = 2**16
"""Answers to a problem stay below it: a row's id has 16 bits for them."""
Samples = Annotated[int, Ge(1), Lt(MOST_SAMPLES)]
LongSeed = Annotated[int, Ge(0), Lt(2**63)]
Positive = Annotated[float, Gt(0), Le(1e30)]  # float32 holds no number above 3e38
Temperature = Annotated[float, Ge(1e-4), Le(1e4)]  # beyond it all distributions are points, or flat
NonNegative = Annotated[float, Ge(0), Le(1e30)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Share = Annotated[float, Gt(0), Lt(1)]
Mass = Annotated[float, Gt(0), Le(1)]
Text = Annotated[str, Match(r"(?s).*\S.*", "not empty")]
TEACHER_NAME = Match(r"[A-Za-z0-9][A-Za-z0-9_-]*", "letters, digits, - and _ (for metric names)")
BENCHMARK_NAME = Match(r"[A-Za-z0-9][A-Za-z0-9._-]*", "letters, digits, ., - and _ (for metric and file names)")
