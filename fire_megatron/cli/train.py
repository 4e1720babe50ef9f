"""The training command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fire_megatron.config.checks import check_recipe
from fire_megatron.config.errors import UserError
from fire_megatron.config.load import load_recipe


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fire_megatron.train",
        description="Distil several teachers into a student on its own samples (multi-teacher OPD with FiRe).",
        epilog="Overrides are recipe keys: student.parallel.tensor=2 run.steps=100 teachers.math.checkpoint=DIR",
    )
    parser.add_argument("--recipe", required=True, help="YAML recipe, see recipes/ and docs/recipe.md")
    parser.add_argument("--check", action="store_true", help="check recipe and checkpoints, then leave")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe. Exit codes: 0 done or stopped on request with everything saved, 2 a mistake in the input."""
    args = _parser().parse_intermixed_args(argv)
    # torch takes seconds to import; mistakes in a recipe should not.
    from fire_megatron.platform import launch

    rank = 0
    try:
        rank = launch.launched_rank()
        recipe = load_recipe(args.recipe, args.overrides)
        check_recipe(recipe, world_size=launch.launched_world_size())
        if args.check:
            if rank == 0:
                print(f"{args.recipe}: no problem found for {launch.launched_world_size()} ranks")
            return 0
        world = launch.start(recipe.run.device, timeout=recipe.run.collective_timeout, threads=recipe.run.threads)
        try:
            from fire_megatron.train.trainer import Trainer

            Trainer(recipe, world).train()
        finally:
            launch.stop()
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0
