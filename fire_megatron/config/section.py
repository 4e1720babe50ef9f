"""What every section of a recipe is made of: frozen dataclasses whose type hints carry the allowed range.

One description of a field, its type hint (``Annotated[float, Range(above=0)]``), serves loading, validation, error
messages and the reference page.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from fire_megatron.config.errors import Problem, RecipeProblems, join_key

INLINE = "inline"
"""Metadata key of a dict field whose entries are written beside the section's other keys, not below a key."""


class Constraint(Protocol):
    """Narrows a type hint inside ``Annotated``."""

    def accepts(self, value: Any) -> bool:
        """Whether the value, already of the right type, is allowed."""
        ...

    def __str__(self) -> str:
        """What is allowed, to follow the type's description: ``at least 1``."""
        ...


@dataclass(frozen=True)
class Range:
    """Bounds of a number."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def accepts(self, value: Any) -> bool:
        """Whether the number lies within the bounds."""
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        bounds = (
            ("above", self.above),
            ("at least", self.at_least),
            ("below", self.below),
            ("at most", self.at_most),
        )
        return " and ".join(f"{name} {bound}" for name, bound in bounds if bound is not None)


@dataclass(frozen=True)
class NonEmpty:
    """A string with something other than blanks in it, or a list with at least one entry."""

    def accepts(self, value: Any) -> bool:
        """Whether there is anything in it."""
        return bool(value.strip() if isinstance(value, str) else value)

    def __str__(self) -> str:
        return "not empty"


@dataclass(frozen=True)
class Match:
    """A string in which a regular expression matches from start to end."""

    pattern: str
    meaning: str

    def accepts(self, value: Any) -> bool:
        """Whether the pattern matches the whole string."""
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.meaning


@dataclass(frozen=True)
class Hint:
    """A type hint taken apart."""

    type: Any
    """The type without None and annotations: a class, Literal[...], tuple[...] or dict[...]."""
    optional: bool
    """Whether None is allowed."""
    constraints: tuple[Constraint, ...]
    """From ``Annotated``."""

    @property
    def origin(self) -> Any:
        """``tuple``, ``dict``, ``Literal`` or the class itself."""
        return get_origin(self.type) or self.type

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments of a generic."""
        return get_args(self.type)

    @property
    def is_section(self) -> bool:
        """Whether the value is a section of its own."""
        return is_dataclass(self.type)

    def item(self, index: int = 0) -> Any:
        """Hint of one entry of a tuple, or of a dict's values."""
        if self.origin is dict:
            return self.args[1] if self.args else Any
        return self.args[0] if self.args[-1] is Ellipsis else self.args[index]

    @property
    def length(self) -> int | None:
        """Number of entries of a tuple of fixed length; None where it is free."""
        return None if self.args[-1] is Ellipsis else len(self.args)


def parse_hint(hint: Any) -> Hint:
    """Take a type hint apart."""
    optional, constraints = False, ()
    while True:
        if get_origin(hint) is Annotated:
            hint, *more = get_args(hint)
            constraints += tuple(more)
        elif get_origin(hint) in (Union, types.UnionType):
            arms = [arm for arm in get_args(hint) if arm is not type(None)]
            assert len(arms) == 1, f"a recipe field has one type, or one type and None; not {hint}"
            hint, optional = arms[0], True
        else:
            return Hint(hint, optional, constraints)


_NOUNS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def describe(hint: Any) -> str:
    """A type hint in words: ``a whole number, at least 1``."""
    parsed = parse_hint(hint)
    if parsed.origin is Literal:
        text = "one of " + ", ".join(str(choice) for choice in parsed.args)
    elif parsed.origin is tuple and parsed.length is None:
        text = f"a list (each entry {describe(parsed.item())})"
    elif parsed.origin is tuple:
        text = f"a list of {parsed.length} (each entry {describe(parsed.item())})"
    elif parsed.origin is dict or parsed.is_section:
        text = "a mapping"
    else:
        text = _NOUNS[parsed.type]
    text = ", ".join([text, *(str(constraint) for constraint in parsed.constraints)])
    return f"{text}; or null" if parsed.optional else text


def violations(hint: Any, value: Any, key: str) -> Iterator[Problem]:
    """Constraints that a value of the right type breaks; nested sections have checked themselves."""
    parsed = parse_hint(hint)
    if value is None or parsed.is_section:
        return
    broken = [constraint for constraint in parsed.constraints if not constraint.accepts(value)]
    if broken:
        shown = list(value) if isinstance(value, tuple) else value
        yield Problem(key, f"{shown!r} is not allowed; it must be {' and '.join(map(str, broken))}")
    elif parsed.origin is Literal and value not in parsed.args:
        yield Problem(key, f"{value!r} is not allowed; it must be {describe(hint)}")
    elif parsed.origin is tuple:
        for index, item in enumerate(value):
            yield from violations(parsed.item(index), item, join_key(key, str(index)))


@dataclass(frozen=True)
class FieldSpec:
    """A field of a section."""

    name: str
    hint: Any
    required: bool
    default: Any
    """MISSING when required."""
    inline: bool


def _default(entry: Field[Any]) -> Any:
    return entry.default_factory() if entry.default_factory is not MISSING else entry.default


@cache
def specs(section: type) -> Mapping[str, FieldSpec]:
    """The fields of a section in order, by name."""
    hints = get_type_hints(section, include_extras=True)
    return {
        entry.name: FieldSpec(
            name=entry.name,
            hint=hints[entry.name],
            required=entry.default is MISSING and entry.default_factory is MISSING,
            default=_default(entry),
            inline=INLINE in entry.metadata,
        )
        for entry in fields(section)
    }


@dataclass(frozen=True)
class Section:
    """Base of every section: checks each field against the constraints in its type hint.

    Raises:
        RecipeProblems: with keys relative to the section.
    """

    def __post_init__(self) -> None:
        problems = [
            problem
            for name, spec in specs(type(self)).items()
            for problem in violations(spec.hint, getattr(self, name), name)
        ]
        problems = problems or list(self._problems())
        if problems:
            raise RecipeProblems(problems)

    def _problems(self) -> Iterator[Problem]:
        """What a section checks beyond the range of each field; called when all of those are in range."""
        yield from ()
