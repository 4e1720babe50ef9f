"""The training command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fire_megatron.config.checks import check_recipe
from fire_megatron.config.errors import UserError
from fire_megatron.config.load import load_recipe
from fire_megatron.config.schema import Recipe


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


def _check(path: str, recipe: Recipe) -> None:
    """Check all that a run checks before it builds a model, and say what was read.

    Raises:
        UserError: what is wrong.
    """
    from fire_megatron.platform import launch, select_device
    from fire_megatron.train import setup

    ranks = launch.launched_world_size()
    _, _, inputs = setup.check(recipe, device=select_device(recipe.run.device), num_ranks=ranks)
    for note in inputs.notes:
        print(note)
    print(f"{path}: no problem found for {ranks} ranks (weights were not read)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe.

    Exit codes: 0 done or stopped on request with everything saved, 2 a mistake in the input, 130 interrupted twice or
    before there was anything to save.
    """
    args = _parser().parse_intermixed_args(argv)
    # torch takes seconds to import; mistakes in a recipe should not.
    from fire_megatron.platform import launch

    rank, recipe, problem = 0, None, None
    try:
        rank = launch.launched_rank()
        try:
            recipe = load_recipe(args.recipe, args.overrides)
            check_recipe(recipe, world_size=launch.launched_world_size())
        except UserError as error:
            problem = str(error)
        launch.raise_on_any_rank(problem)
        if args.check:
            if rank == 0:
                _check(args.recipe, recipe)
            return 0
        world = launch.start(recipe.run.device, timeout=recipe.run.collective_timeout, threads=recipe.run.threads)
        from fire_megatron.train.trainer import Trainer

        Trainer(recipe, world).train()
    except UserError as error:
        if rank == 0 or not error.everywhere:
            where = "" if error.everywhere or launch.launched_world_size() == 1 else f" on rank {rank}"
            print(f"error{where}: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    finally:
        launch.stop()
    return 0
