"""The one walk over dataclass fields and type hints: plain values to sections, and back."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar

from fire_megatron.config.errors import Problem, RecipeProblems, join_key
from fire_megatron.config.section import INLINE, describe, parse_hint, specs

T = TypeVar("T")

_BAD = object()
"""Stands for a value that a problem has been noted for."""


def build(section: type[T], values: Any, *, root: type | None = None) -> T:
    """Make a section from plain values, as read from YAML.

    Args:
        section: the dataclass to make.
        values: mappings, lists and scalars; None for an empty section.
        root: the schema's outermost section, searched for keys that were put into the wrong one.

    Raises:
        RecipeProblems: everything wrong with the keys, types and ranges, in one error.
    """
    walk = _Walk(root or section)
    result = walk.section(section, values, "")
    if walk.problems:
        raise RecipeProblems(walk.problems)
    return result


def plain(value: Any) -> Any:
    """Plain values (mappings, lists, scalars) that :func:`build` turns back into an equal section."""
    if is_dataclass(value) and not isinstance(value, type):
        result: dict[str, Any] = {}
        for entry in fields(value):
            inner = plain(getattr(value, entry.name))
            result |= inner if INLINE in entry.metadata else {entry.name: inner}
        return result
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def all_keys(section: type, prefix: str = "") -> Iterator[str]:
    """Every key below a section; ``NAME`` and ``0`` stand for the keys of a mapping and the entries of a list."""
    for name, spec in specs(section).items():
        if spec.inline:
            continue
        key, hint = join_key(prefix, name), parse_hint(spec.hint)
        yield key
        if hint.origin in (dict, tuple):
            step = "NAME" if hint.origin is dict else "0"
            inner = hint.item()
            if is_dataclass(parse_hint(inner).type):
                yield from all_keys(parse_hint(inner).type, join_key(key, step))
        elif hint.is_section:
            yield from all_keys(hint.type, key)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The most similar known word, if any is similar."""
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(word).lower(), lowered, n=1, cutoff=0.6)
    return lowered[close[0]] if close else None


def unknown_key(prefix: str, key: Any, known: Sequence[str], root: type) -> Problem:
    """The problem of a key that a section does not have, with the key that was probably meant."""
    path, close = join_key(prefix, str(key)), nearest(key, known)
    if close is not None:
        return Problem(path, "unknown key", join_key(prefix, close))
    elsewhere = [other for other in all_keys(root) if other.rsplit(".", 1)[-1] == key]
    if elsewhere:
        return Problem(path, f"unknown key; did you mean {' or '.join(elsewhere[:3])}?")
    return Problem(path, f"unknown key; the keys here are {', '.join(known)}")


_KINDS = ((bool, "true or false"), (str, "a string"), (int, "a whole number"), (float, "a number"))


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    for kind, noun in _KINDS:
        if isinstance(value, kind):
            return noun
    return "a mapping" if isinstance(value, Mapping) else "a list" if isinstance(value, list) else type(value).__name__


class _Walk:
    """Collects problems on the way down."""

    def __init__(self, root: type) -> None:
        self.root = root
        self.problems: list[Problem] = []

    def wrong(self, hint: Any, value: Any, key: str, fix: str = "") -> Any:
        """Note a value of the wrong type."""
        given = "null" if value is None else f"{value!r} is {_kind(value)}"
        self.problems.append(Problem(key, f"{given}; it must be {describe(hint)}{fix}"))
        return _BAD

    def section(self, section: type, values: Any, key: str) -> Any:
        """A dataclass. Null stands for a section whose keys are all left out."""
        values = {} if values is None else values
        if not isinstance(values, Mapping):
            return self.wrong(section, values, key, f" with keys such as {', '.join(list(specs(section))[:3])}")
        known = {name: spec for name, spec in specs(section).items() if not spec.inline}
        inline = next((spec for spec in specs(section).values() if spec.inline), None)
        extra = {name: value for name, value in values.items() if name not in known}
        before = len(self.problems)
        if inline is None:
            self.problems += [unknown_key(key, name, list(known), self.root) for name in extra]
        arguments: dict[str, Any] = {}
        for name, spec in known.items():
            if name in values:
                arguments[name] = self.value(spec.hint, values[name], join_key(key, name))
            elif spec.required:
                self.problems.append(Problem(join_key(key, name), f"missing; give {describe(spec.hint)}"))
        if inline is not None:
            arguments[inline.name] = self.value(inline.hint, extra, key)
        if len(self.problems) > before:
            return _BAD
        try:
            return section(**arguments)
        except RecipeProblems as error:
            self.problems += [problem.under(key) for problem in error.problems]
            return _BAD

    def value(self, hint: Any, value: Any, key: str) -> Any:
        """Anything, by its type hint."""
        parsed = parse_hint(hint)
        if parsed.type is Any:
            return self.anything(value, key)
        if value is None and parsed.optional:
            return None
        if parsed.is_section:
            return self.section(parsed.type, value, key)
        if parsed.origin is dict:
            return self.mapping(hint, value, key)
        if parsed.origin is tuple:
            return self.sequence(hint, value, key)
        return self.scalar(hint, value, key)

    def scalar(self, hint: Any, value: Any, key: str) -> Any:
        """A string, number, flag or choice. A whole number serves as a number; nothing else is converted."""
        parsed = parse_hint(hint)
        if parsed.origin is Literal:
            if isinstance(value, str) and value in parsed.args:
                return value
            close = nearest(value, parsed.args) if isinstance(value, str) else None
            choices = f"did you mean {close}? " if close else ""
            self.problems.append(Problem(key, f"{value!r} is not a choice; {choices}it must be {describe(hint)}"))
            return _BAD
        if parsed.type is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            if isinstance(value, int) and abs(value) > 2**1000 or not math.isfinite(value):
                return self.wrong(hint, value, key, "; infinities and not-a-number are no settings")
            return float(value)
        if type(value) is not parsed.type:
            quotable = parsed.type is str and value is not None and not isinstance(value, (Mapping, list))
            return self.wrong(hint, value, key, " (put it in quotes)" if quotable else "")
        return value

    def sequence(self, hint: Any, values: Any, key: str) -> Any:
        """A tuple, from a list."""
        parsed = parse_hint(hint)
        if not isinstance(values, (list, tuple)):
            scalar = isinstance(values, (str, int, float))
            return self.wrong(hint, values, key, f"; write [{values}]" if scalar else "; write [] for none")
        if parsed.length is not None and len(values) != parsed.length:
            self.problems.append(Problem(key, f"{list(values)!r} has {len(values)} entries; give {parsed.length}"))
            return _BAD
        items = [self.value(parsed.item(i), item, join_key(key, str(i))) for i, item in enumerate(values)]
        return _BAD if any(item is _BAD for item in items) else tuple(items)

    def mapping(self, hint: Any, values: Any, key: str) -> Any:
        """A dict with strings for keys. Null stands for an empty one."""
        values = {} if values is None else values
        if not isinstance(values, Mapping):
            return self.wrong(hint, values, key)
        inner, result = parse_hint(hint).item(), {}
        for name, item in values.items():
            if not isinstance(name, str):
                self.problems.append(Problem(key, f"the key {name!r} is {_kind(name)}; put it in quotes"))
                continue
            result[name] = self.value(inner, item, join_key(key, name))
        return result

    def anything(self, value: Any, key: str) -> Any:
        """A value that another package checks: any plain value, copied."""
        if isinstance(value, Mapping):
            return self.mapping(dict[str, Any], value, key)
        if isinstance(value, (list, tuple)):
            return [self.anything(item, join_key(key, str(i))) for i, item in enumerate(value)]
        if value is not None and not isinstance(value, (bool, int, float, str)):
            return self.wrong(dict, value, key)
        return value
