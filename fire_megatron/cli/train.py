"""The training command."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fire_megatron.config.checks import check_recipe
from fire_megatron.config.errors import UserError
from fire_megatron.config.load import load_recipe
from fire_megatron.config.schema import Recipe

if TYPE_CHECKING:
    from fire_megatron.platform import Watch, World


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
    from fire_megatron.train import inputs

    ranks = launch.launched_world_size()
    _, _, read = inputs.check(recipe, device=select_device(recipe.run.device), num_ranks=ranks)
    for note in read.notes:
        print(note)
    print(f"{path}: no problem found for {ranks} ranks (weights were not read)")


def _train(recipe: Recipe, world: World) -> int:
    """Train, with an eye on the other ranks: when one of them fails, all of them leave and say which."""
    from fire_megatron.platform import launch
    from fire_megatron.platform.watch import EXIT_CODE, FAREWELL_IN_FAILURE
    from fire_megatron.train.inputs import rank_roles
    from fire_megatron.train.interrupt import StopRequest
    from fire_megatron.train.status import note_failure
    from fire_megatron.train.trainer import Trainer

    held = rank_roles(recipe, world)
    watch = launch.watch(world, roles=held, timeout=recipe.run.collective_timeout)

    def note(reason: str, *, hopeless: bool = False) -> None:
        if world.is_main:
            note_failure(Path(recipe.run.dir), reason, hopeless=hopeless)

    watch.on_leave = note
    watch.start()
    stop = StopRequest().install()  # loading takes its time, and what asks to stop may not ask again
    try:
        Trainer(recipe, world, watch, stop).train()
        watch.close()
        return 0
    except UserError as error:
        note(str(error), hopeless=not error.passing)
        if error.everywhere or world.size == 1:
            watch.close()
            raise
        reason, code = str(error), 2
        launch.report_mistake(error)
        print(f"error on rank {world.rank}: {reason}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        if world.size == 1:
            raise
        reason, code = f"{held} on rank {world.rank} was interrupted", 130
    except Exception as error:
        if world.size == 1:
            note(f"{type(error).__name__}: {error}")
            raise
        traceback.print_exc()
        reason, code = _reason(error, watch, f"{held} on rank {world.rank}"), EXIT_CODE
        note(reason)
        print(f"error: {reason}", file=sys.stderr, flush=True)
    watch.fail(reason)
    watch.close(farewell=FAREWELL_IN_FAILURE)
    sys.stdout.flush()
    os._exit(code)  # to take process groups apart may wait for ranks that are not there


def _reason(error: Exception, watch: Watch, here: str) -> str:
    """What failed: often an error is the mere consequence of what happened to another rank."""
    missing = watch.missing()
    if not missing:
        return f"{here} failed: {type(error).__name__}: {error}"
    return (
        f"{watch.describe(missing)}: no sign of life since, so the run ends; run again to continue from the last "
        "checkpoint"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe.

    Exit codes: 0 done, or stopped on request with everything saved that was sound, 2 a mistake in the input, 3 another
    rank has died or failed, 130 interrupted twice or before there was anything to save.
    """
    args = _parser().parse_intermixed_args(argv)
    # torch takes seconds to import; mistakes in a recipe should not.
    from fire_megatron.platform import launch
    from fire_megatron.platform.apex import refuse_other_apex

    rank, recipe, problem = 0, None, None
    try:
        rank = launch.launched_rank()
        try:
            refuse_other_apex()
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
        return _train(recipe, world)
    except UserError as error:
        launch.report_mistake(error)
        if rank == 0 or not error.everywhere:
            where = "" if error.everywhere or launch.launched_world_size() == 1 else f" on rank {rank}"
            print(f"error{where}: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    finally:
        launch.stop()
