"""``fire-megatron recipe``: the recipe as a run would use it, for people and for scripts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from fire_megatron.cli.command import add_recipe, telling_mistakes
from fire_megatron.config.errors import RecipeError
from fire_megatron.config.load import load_recipe, recipe_to_dict
from fire_megatron.config.yaml_text import dump_yaml


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fire-megatron recipe", description="Print a recipe with its defaults and overrides."
    )
    add_recipe(parser)
    parser.add_argument("--key", help="print this key's value alone, such as run.dir; null where it has none")
    return parser


def _value(values: object, key: str) -> object:
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            raise RecipeError(f"--key {key}: the recipe has no such key")
        values = values[part]
    return values


@telling_mistakes
def main(argv: Sequence[str] | None = None) -> int:
    """Print it. Exit codes: 0 printed, 2 a mistake in the recipe."""
    args = _parser().parse_intermixed_args(argv)
    values: object = recipe_to_dict(load_recipe(args.recipe, args.overrides))
    if args.key:
        values = _value(values, args.key)
    if isinstance(values, (dict, list)):
        print(dump_yaml(values), end="")
    else:
        print(values if isinstance(values, str) else json.dumps(values))
    return 0
