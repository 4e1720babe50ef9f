"""What every section of a recipe is made of: frozen pydantic models, and errors that name key, value and fix.

One description of a field, its type hint (``Annotated[float, Gt(0)]``), serves loading, validation, error messages and
the reference page.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from fire_megatron.config.errors import Problem, RecipeProblems, join_key


def or_empty(values: Any) -> Any:
    """Null stands for a section or mapping whose keys are all left out."""
    return {} if values is None else values


class Section(BaseModel):
    """Base of every section: checks types, ranges and keys.

    Raises:
        RecipeProblems: with keys relative to the section.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def __init__(self, *args: Any, **values: Any) -> None:
        """Fields in order, or by name."""
        assert len(args) <= len(type(self).model_fields), args
        values |= dict(zip(type(self).model_fields, args, strict=False))
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise RecipeProblems(_problems(error, type(self))) from None

    __init__.__pydantic_base_init__ = True  # pydantic makes inner sections without it, so that all problems add up

    _or_empty = model_validator(mode="before")(or_empty)

    def model_post_init(self, _: Any) -> None:
        """Checks across fields, when each of them is in range."""
        problems = list(self._problems())
        if problems:
            raise RecipeProblems(problems)

    def _problems(self) -> Iterator[Problem]:
        """What a section checks beyond the range of each field."""
        yield from ()

    def replace(self, **changes: Any) -> Self:
        """The same section with other values, checked again."""
        return type(self)(**dict(self) | changes)


def build(section: type[Section], values: Any) -> Any:
    """Make a section from plain values, as read from YAML.

    Raises:
        RecipeProblems: everything wrong with the keys, types and ranges, in one error.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise RecipeProblems(_problems(error, section)) from None


def plain(value: Any, key: str = "") -> Any:
    """Plain values (mappings, lists, scalars) that :func:`build` turns back into an equal section; a copy.

    Raises:
        RecipeProblems: a value of another type at ``key`` or below, or a key that is no string.
    """
    if isinstance(value, (Section, Mapping)):
        values = dict(value)
        for name in values:
            if not isinstance(name, str):
                raise RecipeProblems([_no_text(key, name)])
        return {name: plain(item, join_key(key, name)) for name, item in values.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, join_key(key, str(i))) for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise RecipeProblems([Problem(key, f"{value!r} is {kind_of(value)}; it must be a value that YAML can write")])


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
        return isinstance(self.type, type) and issubclass(self.type, Section)

    @property
    def length(self) -> int | None:
        """Number of entries of a tuple of fixed length; None where it is free."""
        return None if self.args[-1] is Ellipsis else len(self.args)

    def item(self, key: Any = None) -> Any:
        """Hint of what is at a key of a section, or of each entry of a mapping or list."""
        return self.type.model_fields[key] if self.is_section else self.args[1 if self.origin is dict else 0]


_LIMITS = {"ge": "at least {}", "gt": "above {}", "lt": "below {}", "le": "at most {}", "min_length": "not empty"}
_LIMITS |= {"documentation": "{}"}


def parse_hint(hint: Any) -> Hint:
    """Take a type hint apart."""
    if isinstance(hint, Hint):
        return hint
    optional, limits = False, []
    while True:
        if isinstance(hint, FieldInfo):
            hint = hint.rebuild_annotation()
        if get_origin(hint) is Annotated:
            hint, *more = get_args(hint)
            limits += [
                text.format(getattr(m, name)) for m in more for name, text in _LIMITS.items() if hasattr(m, name)
            ]
        elif get_origin(hint) in (Union, types.UnionType):
            (hint,) = (arm for arm in get_args(hint) if arm is not type(None))
            optional = True
        else:
            return Hint(hint, optional, " and ".join(limits))


_NOUNS = {bool: "true or false", str: "a string", int: "a whole number", float: "a number"}


def describe(hint: Any) -> str:
    """A type hint in words: ``a whole number, at least 1``."""
    parsed = parse_hint(hint)
    if parsed.origin is Literal:
        text = "one of " + ", ".join(str(choice) for choice in parsed.args)
    elif parsed.origin is tuple:
        count = "" if parsed.length is None else f" of {parsed.length}"
        text = f"a list{count} (each entry {describe(parsed.item())})"
    else:
        text = _NOUNS.get(parsed.type, "a mapping")
    text = f"{text}, {parsed.limits}" if parsed.limits else text
    return f"{text}; or null" if parsed.optional else text


def _no_text(key: str, name: Any) -> Problem:
    return Problem(key, f"the key {name!r} is {kind_of(name)}; put it in quotes")


def kind_of(value: Any) -> str:
    """A value's type in words."""
    nouns = {type(None): "null", list: "a list", dict: "a mapping"} | _NOUNS
    return nouns.get(type(value), type(value).__name__)


def all_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
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


def unknown_key(prefix: str, key: Any, section: type[Section], root: type[Section]) -> Problem:
    """The problem of a key that a section does not have, with the key that was probably meant."""
    known, path = list(section.model_fields), join_key(prefix, str(key))
    close = nearest(key, known)
    if close is not None:
        return Problem(path, "unknown key", join_key(prefix, close))
    elsewhere = [other for other in all_keys(root) if other.rsplit(".", 1)[-1] == key]
    if elsewhere:
        return Problem(path, f"unknown key; did you mean {' or '.join(elsewhere[:3])}?")
    return Problem(path, f"unknown key; the keys here are {', '.join(known)}")


def _problems(error: ValidationError, root: type[Section]) -> Iterator[Problem]:
    """pydantic's errors in our words."""
    for entry in error.errors(include_url=False):
        key, cause = ".".join(map(str, entry["loc"])), entry.get("ctx", {}).get("error")
        if isinstance(cause, RecipeProblems):
            yield from (problem.under(key) for problem in cause.problems)
        else:
            yield _problem(entry["type"], entry["loc"], entry["input"], root)


_OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "too_short")
_OUT_OF_RANGE += ("string_pattern_mismatch",)


def _problem(kind: str, loc: tuple[Any, ...], value: Any, root: type[Section]) -> Problem:
    """One of pydantic's errors: its type, where, and the value that it is about."""
    *parents, last = loc or ("",)
    prefix, key, hint = ".".join(map(str, parents)), ".".join(map(str, loc)), parse_hint(root)
    for part in loc[: -2 if last == "[key]" else -1]:
        hint = parse_hint(hint.item(part))
    if last == "[key]":
        prefix, limits = ".".join(map(str, loc[:-2])), parse_hint(hint.args[0]).limits
        text = kind == "string_type"
        return _no_text(prefix, value) if text else Problem(prefix, f"{value!r} is no name; it must be {limits}")
    if kind in ("extra_forbidden", "invalid_key"):
        return unknown_key(prefix, last, hint.type, root)
    if kind == "missing" and hint.origin is tuple:
        return Problem(prefix, f"{value!r} has {len(value)} entries; give {hint.length}")
    hint = parse_hint(hint.item(last)) if loc else hint
    wanted = describe(hint)
    if kind == "missing":
        return Problem(key, f"missing; give {wanted}")
    if kind == "too_long":
        return Problem(key, f"{value!r} has {len(value)} entries; give {hint.length}")
    if kind == "literal_error":
        close = nearest(value, hint.args) if isinstance(value, str) else None
        meant = f"did you mean {close}? " if close else ""
        return Problem(key, f"{value!r} is not a choice; {meant}it must be {wanted}")
    if kind in _OUT_OF_RANGE:
        return Problem(key, f"{value!r} is not allowed; it must be {hint.limits}")
    given = "null" if value is None else f"{value!r} is {kind_of(value)}"
    return Problem(key, f"{given}; it must be {wanted}{_fix(hint, value)}")


def _fix(hint: Hint, value: Any) -> str:
    """What to do about a value of the wrong type, after what it must be."""
    scalar = isinstance(value, (str, int, float))
    if hint.is_section:
        return f" with keys such as {', '.join(list(hint.type.model_fields)[:3])}"
    if hint.origin is tuple:
        return f"; write [{value}]" if scalar else "; write [] for none"
    if hint.type is float and scalar and not isinstance(value, (str, bool)):
        return "; infinities and not-a-number are no settings"
    return (
        " (put it in quotes)" if hint.type is str and value is not None and not isinstance(value, (dict, list)) else ""
    )
