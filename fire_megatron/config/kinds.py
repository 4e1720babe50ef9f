"""Kinds of numbers and texts that the fields of a recipe take."""

from __future__ import annotations

from typing import Annotated

from fire_megatron.config.section import NonEmpty, Range

Count = Annotated[int, Range(at_least=0)]
Size = Annotated[int, Range(at_least=1)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(at_least=0)]
Fraction = Annotated[float, Range(at_least=0, below=1)]
Share = Annotated[float, Range(above=0, below=1)]
Threads = Annotated[int, Range(at_least=0, at_most=1024)]
Text = Annotated[str, NonEmpty()]
Seed = Annotated[int, Range(at_least=0, below=2**31)]
