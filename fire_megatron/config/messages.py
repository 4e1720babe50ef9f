"""What a recipe's sections take, in words: type hints taken apart, and pydantic's errors as key, value and fix."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fire_megatron.config.errors import RecipeProblem, RecipeProblems, join_key

_NOUNS = {bool: "true or false", str: "a string", int: "a whole number", float: "a number"}
_LIMITS = {"ge": "at least", "gt": "above", "lt": "below", "le": "at most", "meaning": "", "documentation": ""}
"""Attributes of the annotations that narrow a type, in words."""
_OUT_OF_RANGE = re.compile("(greater|less)_than(_equal)?|too_(short|long)|string_pattern_mismatch")
"""pydantic's types of errors where a value of the right type breaks one of these."""


@dataclass(frozen=True)
class Hint:
    """A type hint taken apart."""

    type: Any
    """The type without None and annotations: a class, Literal[...], tuple[...] or dict[...]."""
    optional: bool
    """Whether None is allowed."""
    limits: str
    """What is allowed, to follow the type's description: ``at least 1``."""

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
        return isinstance(self.type, type) and issubclass(self.type, BaseModel)

    def item(self, key: Any = None) -> Any:
        """Hint of what is at a key of a section, or of each entry of a mapping or list."""
        return self.type.model_fields[key] if self.is_section else self.args[1 if self.origin is dict else 0]


def parse_hint(hint: Any) -> Hint:
    """Take a type hint, or a section's field, apart."""
    optional, limits = False, []
    while True:
        if isinstance(hint, FieldInfo):
            hint = hint.rebuild_annotation()
        if get_origin(hint) is Annotated:
            hint, *marks = get_args(hint)
            found = [(word, getattr(m, name)) for m in marks for name, word in _LIMITS.items() if hasattr(m, name)]
            limits += [f"{word} {bound}".strip() for word, bound in found]
        elif get_origin(hint) in (Union, types.UnionType):
            (hint,) = (arm for arm in get_args(hint) if arm is not type(None))
            optional = True
        else:
            return Hint(hint, optional, " and ".join(limits))


def describe(hint: Any, fix: str = "") -> str:
    """A type hint in words: ``a whole number, at least 1``; ``fix`` says what to do, where it goes with the type."""
    parsed = hint if isinstance(hint, Hint) else parse_hint(hint)
    if parsed.origin is Literal:
        text = "one of " + ", ".join(str(choice) for choice in parsed.args)
    elif parsed.origin is tuple:
        text = f"a list (each entry {describe(parsed.item())})"
    else:
        text = _NOUNS.get(parsed.type, "a mapping")
    text = (f"{text}, {parsed.limits}" if parsed.limits else text) + fix
    return f"{text}; or null" if parsed.optional else text


def kind_of(value: Any) -> str:
    """A value's type in words."""
    nouns = {type(None): "null", list: "a list", dict: "a mapping"} | _NOUNS
    return nouns.get(type(value), type(value).__name__)


def all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key below a section; ``NAME`` and ``0`` stand for the keys of a mapping and the entries of a list."""
    for name, field in section.model_fields.items():
        key, hint = join_key(prefix, name), parse_hint(field)
        yield key
        if hint.origin in (dict, tuple):
            key, hint = join_key(key, "NAME" if hint.origin is dict else "0"), parse_hint(hint.item())
        if hint.is_section:
            yield from all_keys(hint.type, key)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The most similar known word, if any is similar."""
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(word).lower(), lowered, n=1, cutoff=0.6)
    return lowered[close[0]] if close else None


def unknown_key(prefix: str, key: Any, section: type[BaseModel], root: type[BaseModel]) -> RecipeProblem:
    """The problem of a key that a section does not have, with the key that was probably meant, here or elsewhere."""
    known, path = list(section.model_fields), join_key(prefix, str(key))
    close = nearest(key, known)
    if close is not None:
        return RecipeProblem(path, "unknown key", join_key(prefix, close))
    elsewhere = [other for other in all_keys(root) if other.rsplit(".", 1)[-1] == key]
    if elsewhere:
        return RecipeProblem(path, f"unknown key; did you mean {' or '.join(elsewhere[:3])}?")
    return RecipeProblem(path, f"unknown key; the keys here are {', '.join(known)}")


def unquoted_key(prefix: str, key: Any) -> RecipeProblem:
    """The problem of a key of a mapping that YAML takes for something other than a string."""
    return RecipeProblem(prefix, f"the key {key!r} is {kind_of(key)}; put it in quotes")


def problems(error: ValidationError, root: type[BaseModel]) -> Iterator[RecipeProblem]:
    """What pydantic found wrong with the values of a section, in our words.

    Args:
        error: from pydantic.
        root: the section, searched for keys that were put into the wrong one.
    """
    for entry in error.errors(include_url=False):
        context: dict[str, Any] = entry.get("ctx", {})
        cause = context.get("error")
        if isinstance(cause, RecipeProblems):
            yield from (problem.under(_join(entry["loc"])) for problem in cause.problems)
        elif entry["type"] != "too_short" or len(entry["input"]) < context["min_length"]:  # it counts sound items alone
            yield _problem(entry["type"], entry["loc"], entry["input"], root)


def _join(location: Iterable[str | int]) -> str:
    return ".".join(map(str, location))


def _problem(kind: str, location: tuple[str | int, ...], value: Any, root: type[BaseModel]) -> RecipeProblem:
    """One error: its type as pydantic names it, where, and the value that it is about."""
    hint, is_key, unknown = parse_hint(root), location[-1:] == ("[key]",), kind in ("extra_forbidden", "invalid_key")
    path = location[: -2 if is_key else -1 if unknown else None]
    for part in path:
        hint = parse_hint(hint.item(part))
    key = _join(path)
    if kind == "invalid_key":
        return unquoted_key(key, location[-1])
    if unknown:
        return unknown_key(key, location[-1], hint.type, root)
    if is_key and not isinstance(value, str):
        return unquoted_key(key, value)
    if is_key:
        text = f"{value!r} is no name; it must be {parse_hint(hint.args[0]).limits}"
    elif kind == "missing":
        text = f"missing; give {describe(hint)}"
    elif kind == "literal_error":
        close = nearest(value, hint.args) if isinstance(value, str) else None
        meant = f"did you mean {close}? " if close else ""
        text = f"{value!r} is not a choice; {meant}it must be {describe(hint)}"
    elif _OUT_OF_RANGE.fullmatch(kind):
        text = f"{value!r} is not allowed; it must be {hint.limits}"
    else:
        given = "null" if value is None else f"{value!r} is {kind_of(value)}"
        text = f"{given}; it must be {describe(hint, _fix(hint, value))}"
    return RecipeProblem(key, text)


def _fix(hint: Hint, value: Any) -> str:
    """What to do about a value of the wrong type, to follow what it must be."""
    scalar = isinstance(value, (bool, int, float, str))
    if hint.is_section:
        return f" with keys such as {', '.join(list(hint.type.model_fields)[:3])}"
    if hint.origin is tuple:
        return f"; write [{value}]" if scalar else "; write [] for none"
    if hint.type is float and type(value) in (int, float):
        return "; infinities and not-a-number are no settings"
    return " (put it in quotes)" if hint.type is str and scalar else ""
