"""What commands share: arguments that name a recipe, bounds of numbers, and a user's mistake as an exit code."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence

from fire_megatron.config.errors import UserError
from fire_megatron.platform.quiet import quiet_third_parties

Main = Callable[[Sequence[str] | None], int]


def add_recipe(parser: argparse.ArgumentParser, *, option: bool = False) -> None:
    """Arguments for a recipe and its overrides; ``option`` spells the recipe ``--recipe FILE``."""
    spelling = {"required": True} if option else {}
    parser.add_argument(
        "--recipe" if option else "recipe", help="YAML recipe, see recipes/ and docs/recipe.md", **spelling
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")


def check_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """Raises UserError: one of these options is below ``least``."""
    for name in names:
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least {least}")


def telling_mistakes(main: Main) -> Main:
    """A command in one process, whose UserError or Ctrl-C becomes a line on standard error and exit code 2 or 130."""

    @functools.wraps(main)
    def told(argv: Sequence[str] | None = None) -> int:
        quiet_third_parties()
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted; nothing is written", file=sys.stderr)
            return 130

    return told
