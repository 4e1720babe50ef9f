"""YAML and overrides to a checked :class:`Recipe` and back, by walking the schema's fields and types."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fire_megatron.config.errors import RecipeError
from fire_megatron.config.schema import BUILT_IN_HOOKS, HookConfig, Recipe


class _Loader(yaml.SafeLoader):
    """Safe YAML where a repeated key is an error and ``1e-5`` is a number (YAML 1.1 reads it as text)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                mark = key_node.start_mark
                raise RecipeError(f"{mark.name}, line {mark.line + 1}: the key {key!r} stands there twice; remove one")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$|^[-+]?\d+\.\d*$|^[-+]?\.\d+$|^[-+]?\.(inf|nan)$"),
    list("-+0123456789."),
)


def _parse_yaml(text: str, name: str) -> Any:
    try:
        loader = _Loader(text)
        loader.name = name
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{name}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error


# ---- values to dataclasses --------------------------------------------------------------------------------------


def _type_name(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_name(a) for a in args)
    if origin is tuple:
        return f"a list of {len(args)} values" if args[-1] is not Ellipsis else "a list"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}.get(
        hint, str(hint)
    )


def _mismatch(path: str, value: Any, hint: Any) -> RecipeError:
    return RecipeError(f"{path}: {value!r} is not {_type_name(hint)}")


def _scalar(path: str, value: Any, hint: Any) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise _mismatch(path, value, hint)


def _tuple(path: str, value: Any, hint: Any) -> tuple:
    args = typing.get_args(hint)
    if not isinstance(value, (list, tuple)):
        raise _mismatch(path, value, hint)
    if args[-1] is Ellipsis:
        return tuple(_convert(f"{path}.{i}", item, args[0]) for i, item in enumerate(value))
    if len(value) != len(args):
        raise _mismatch(path, value, hint)
    return tuple(_convert(f"{path}.{i}", v, a) for i, (v, a) in enumerate(zip(value, args, strict=True)))


def _convert(path: str, value: Any, hint: Any) -> Any:
    """Check ``value`` against a type hint and turn it into what the schema holds."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Literal:
        # YAML 1.1 reads off and on as booleans.
        value = {False: "off", True: "on"}.get(value, value) if isinstance(value, bool) else value
        if value not in args:
            near = difflib.get_close_matches(str(value), map(str, args), n=1)
            hint_text = f"; did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"{path}: {value!r} is not one of {', '.join(map(repr, args))}{hint_text}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(path, value, next(a for a in args if a is not type(None)))
    if origin is tuple:
        return _tuple(path, value, hint)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _mismatch(path, value, hint)
        return {str(k): _convert(f"{path}.{k}", v, args[1]) for k, v in value.items()}
    if hint is HookConfig:
        return _hook(path, value)
    if dataclasses.is_dataclass(hint):
        return _section(path, value, hint)
    return _scalar(path, value, hint)


def _hook(path: str, value: Any) -> HookConfig:
    """``{name: filter, percentile: 20}``; options of built-in hooks are checked against their dataclass."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise RecipeError(f"{path}: {value!r} is not a mapping with a name, such as {{name: filter, percentile: 20}}")
    options = {k: v for k, v in value.items() if k != "name"}
    if value["name"] in BUILT_IN_HOOKS:
        _section(path, options, BUILT_IN_HOOKS[value["name"]])
    return HookConfig(value["name"], options)


def _section(path: str, value: Any, cls: type) -> Any:
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        raise RecipeError(f"{path or 'recipe'}: {value!r} is not a mapping")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in fields:
            raise _unknown_key(f"{prefix}{key}", str(key), fields)
    converted = {key: _convert(f"{prefix}{key}", item, hints[key]) for key, item in value.items()}
    missing = [
        name
        for name, f in fields.items()
        if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise RecipeError(f"{prefix}{missing[0]}: missing; {_type_name(hints[missing[0]])} is needed there")
    try:
        return cls(**converted)
    except RecipeError as error:
        raise RecipeError(f"{prefix}{error}") from error


def _unknown_key(path: str, key: str, known: Mapping[str, Any]) -> RecipeError:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return RecipeError(f"{path}: no such key; {hint}")


# ---- overrides --------------------------------------------------------------------------------------------------


def _apply_override(tree: Any, override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise RecipeError(f"override {override!r}: write it as key=value, such as run.steps=100")
    keys = path.split(".")
    node = tree
    for depth, key in enumerate(keys):
        here = ".".join(keys[: depth + 1])
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise RecipeError(f"{here}: the list has entries 0 to {len(node) - 1}, not {key!r}")
            key = int(key)  # type: ignore[assignment]
        elif not isinstance(node, dict):
            raise RecipeError(f"{here}: {'.'.join(keys[:depth])} is a single value and has no keys")
        if last:
            node[key] = _parse_yaml(text, f"override {override!r}")
        else:
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
            node = node[key]


# ---- public -----------------------------------------------------------------------------------------------------


def recipe_from_dict(tree: Mapping[str, Any]) -> Recipe:
    """Build a recipe from plain values.

    Raises:
        RecipeError: an unknown or missing key, a wrong type, or a value out of range, each named by its full key.
    """
    return _section("", tree, Recipe)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply ``a.b.c=value`` overrides (values are YAML; lists take indices).

    Raises:
        RecipeError: the file cannot be read, is not YAML, or does not fit the schema.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--recipe {path}: cannot be read ({error})") from error
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections ({', '.join(f.name for f in dataclasses.fields(Recipe))})")
    for override in overrides:
        _apply_override(tree, override)
    return recipe_from_dict(tree)


def recipe_to_dict(recipe: Any) -> Any:
    """Plain mappings, lists and scalars, from which :func:`recipe_from_dict` makes an equal recipe."""
    if isinstance(recipe, HookConfig):
        return {"name": recipe.name, **recipe_to_dict(recipe.options)}
    if dataclasses.is_dataclass(recipe):
        return {f.name: recipe_to_dict(getattr(recipe, f.name)) for f in dataclasses.fields(recipe)}
    if isinstance(recipe, Mapping):
        return {k: recipe_to_dict(v) for k, v in recipe.items()}
    if isinstance(recipe, (list, tuple)):
        return [recipe_to_dict(v) for v in recipe]
    return recipe


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the resolved recipe as YAML, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False), encoding="utf-8")
    os.replace(temporary, path)
