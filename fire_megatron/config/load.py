"""Recipes in and out: YAML file plus overrides to :class:`Recipe`, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fire_megatron.config.errors import RecipeError, RecipeProblems
from fire_megatron.config.messages import nearest
from fire_megatron.config.overrides import apply_overrides
from fire_megatron.config.schema import Recipe
from fire_megatron.config.section import build, plain
from fire_megatron.config.yaml_text import dump_yaml, parse_yaml


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides.

    Args:
        path: a YAML file.
        overrides: ``a.b.c=value`` each, later ones win; see :func:`fire_megatron.config.overrides.apply_overrides`.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or has keys, types or values that the schema refuses.
    """
    values = parse_yaml(_read(Path(path)), source=str(path))
    if not isinstance(values, dict):
        what = "is empty" if values is None else "is not a mapping"
        raise RecipeError(f"{path}: {what}; a recipe has sections such as run:, student: and teachers:")
    apply_overrides(values, overrides, Recipe)
    try:
        return recipe_from_dict(values)
    except RecipeProblems as error:
        raise RecipeProblems(error.problems, str(path)) from None


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values, as in YAML.

    Raises:
        RecipeProblems: everything wrong with keys, types and ranges.
    """
    return build(Recipe, values)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values with every default written out; :func:`recipe_from_dict` gives an equal recipe back."""
    return plain(recipe)


def recipe_text(recipe: Recipe) -> str:
    """A recipe as YAML, with every default written out."""
    return dump_yaml(recipe_to_dict(recipe))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        others = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        close = nearest(path.name, others)
        advice = f"; did you mean {path.parent / close}?" if close else "; give the path of a YAML recipe"
        raise RecipeError(f"{path}: no such recipe file{advice}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML recipe") from None
