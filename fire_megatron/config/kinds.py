"""Kinds of values that the fields of a recipe take."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, BeforeValidator, Field, Strict
from typing_extensions import Doc

from fire_megatron.config.section import or_empty, plain

T = TypeVar("T")
Count = Annotated[int, Ge(0)]
Size = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Share = Annotated[float, Gt(0), Lt(1)]
Chance = Annotated[float, Gt(0), Le(1)]
Percentile = Annotated[float, Ge(0), Lt(100)]
Threads = Annotated[int, Ge(0), Le(1024)]
Samples = Annotated[int, Ge(1), Lt(2**16)]
Seed = Annotated[int, Ge(0), Lt(2**31)]
Text = Annotated[str, Field(pattern=r"\S"), Doc("not empty")]
Ranks = Annotated[str, Field(pattern=r"^\d+(-\d+)?$"), Doc("first-last, such as 8-15, or one rank in quotes")]
_WORD, _MEANING = r"^[A-Za-z0-9][A-Za-z0-9%s_-]*$", "letters, digits, %s- and _ (it becomes a part of %s names)"
TeacherName = Annotated[str, Field(pattern=_WORD % ""), Doc(_MEANING % ("", "metric"))]
BenchmarkName = Annotated[str, Field(pattern=_WORD % "."), Doc(_MEANING % ("., ", "metric and file"))]
List = Annotated[tuple[T, ...], Strict(False)]
"""From a YAML list."""
Filled = Annotated[List[T], MinLen(1)]
Pair = Annotated[tuple[T, T], Strict(False)]
OrEmpty = BeforeValidator(or_empty)
Options = Annotated[dict[str, Annotated[Any, AfterValidator(plain)]], OrEmpty]
"""Plain values that others check."""
