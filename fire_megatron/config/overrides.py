"""Overrides: ``a.b.c=value`` from the command line, put into the plain values before they are checked."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, Literal

from fire_megatron.config.errors import RecipeError, RecipeProblem, RecipeProblems, join_key
from fire_megatron.config.messages import Hint, describe, parse_hint, unknown_key
from fire_megatron.config.section import plain
from fire_megatron.config.yaml_text import parse_yaml


def apply_overrides(values: dict[str, Any], overrides: Sequence[str], root: type) -> None:
    """Set keys in ``values``, in order; a later override of the same key wins.

    Lists are entered by index (``data.train.0.path=x``), or by the name of an entry that has one
    (``loss.hooks.filter.percentile=30``); the index after the last adds an entry. Mappings take new names
    (``teachers.code.checkpoint=DIR``). A list that the file leaves out starts from its default.

    Args:
        values: plain values of the recipe, changed in place.
        overrides: ``key=value``; the value is YAML, except that a key that holds text takes it as it stands.
        root: the schema.

    Raises:
        RecipeProblems: a key that the schema does not have, with the nearest one.
        RecipeError: an override that is not ``key=value`` or whose value is not YAML.
    """
    problems: list[RecipeProblem] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key or not all(key.split(".")):
            raise RecipeError(f"override {override!r}: write it as key=value, for example run.steps=100")
        try:
            _Override(root, text).apply(values, key.split("."))
        except RecipeProblems as error:
            problems += error.problems
    if problems:
        raise RecipeProblems(problems, "override")


def _put(here: dict[str, Any] | list[Any], key: Any, value: Any) -> None:
    """Set a key, or a list's entry, which may be the one after the last."""
    if isinstance(here, list):
        here[key : key + 1] = [value]
    else:
        here[key] = value


class _Override:
    """One ``key=value``, on its way from the root to the value that it sets."""

    def __init__(self, root: type, text: str) -> None:
        self.root, self.text = root, text

    def apply(self, values: dict[str, Any], parts: Sequence[str]) -> None:
        """Descend by schema and values together, then set the last key."""
        hint: Any = self.root
        here: Any = values
        for depth, part in enumerate(parts):
            prefix, parsed = ".".join(parts[:depth]), parse_hint(hint)
            hint = self._child(parsed, part, prefix)
            key: Any = part
            if parsed.origin is tuple:
                key = self._index(here, part, prefix)
            if depth + 1 == len(parts):
                value = self._value(hint, ".".join(parts))
                return _put(here, key, value)
            here = self._enter(here, key, hint, join_key(prefix, part))

    def _child(self, parent: Hint, part: str, prefix: str) -> Any:
        """Type hint of the key ``part`` of a section, list or mapping."""
        if parent.is_section and part not in parent.type.model_fields:
            if parent.type.model_config["extra"] == "allow":
                return Any
            raise RecipeProblems([unknown_key(prefix, part, parent.type, self.root)])
        if parent.is_section or parent.origin in (dict, tuple):
            return parent.item(part)
        if parent.type is Any:
            return Any
        problem = RecipeProblem(join_key(prefix, part), f"{prefix} is {describe(parent.type)} and holds no keys")
        raise RecipeProblems([problem])

    def _index(self, here: list[Any], part: str, prefix: str) -> int:
        """Position of a list's entry: a number, or the ``name`` of the one entry that has it."""
        count, names = len(here), [entry.get("name") if isinstance(entry, dict) else None for entry in here]
        if names.count(part) > 1:
            keys = " or ".join(join_key(prefix, str(i)) for i, name in enumerate(names) if name == part)
            raise RecipeProblems([RecipeProblem(join_key(prefix, part), f"several entries have the name; use {keys}")])
        if part in names:
            return names.index(part)
        if not part.isdecimal() or int(part) > count:
            known = f"0 to {count - 1} to change an entry, {count} to add one" if count else "0 to add the first"
            raise RecipeProblems([RecipeProblem(join_key(prefix, part), f"not an entry of the list; use {known}")])
        return int(part)

    def _enter(self, here: Any, key: Any, hint: Any, path: str) -> Any:
        """The container below ``here``, made where the file leaves it out. A copy, since YAML aliases share theirs."""
        parsed, given = parse_hint(hint), getattr(hint, "default", None)
        if key >= len(here) if isinstance(here, list) else here.get(key) is None:
            fresh: Any = {} if parsed.origin is not tuple else plain(given) if isinstance(given, tuple) else []
            _put(here, key, fresh)
        here[key] = inner = copy(here[key])
        expected: type = list if parsed.origin is tuple else dict
        if parsed.type is Any and isinstance(inner, (dict, list)) or isinstance(inner, expected):
            return inner
        raise RecipeProblems([RecipeProblem(path, f"{inner!r} holds no keys; override {path} itself")])

    def _value(self, hint: Any, key: str) -> Any:
        """The text as YAML, or as it stands where text is expected."""
        parsed = parse_hint(hint)
        is_text = parsed.type is str or parsed.origin is Literal
        try:
            value = parse_yaml(self.text, source="value")
        except RecipeError as error:
            if is_text:
                return self.text
            raise RecipeProblems([RecipeProblem(key, f"{self.text!r} is not YAML ({error})")]) from error
        if is_text and not isinstance(value, str) and not (value is None and parsed.optional):
            return self.text
        return value
