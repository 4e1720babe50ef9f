"""The training command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fire_megatron.cli.command import add_recipe
from fire_megatron.cli.supervision import run_command, supervised
from fire_megatron.config.checkpoints import checkpoint_folder
from fire_megatron.config.checks import check_recipe
from fire_megatron.config.errors import RecipeError
from fire_megatron.config.load import load_recipe
from fire_megatron.config.schema import Recipe
from fire_megatron.metrics.logger import RECIPE_FILE, writing_to
from fire_megatron.platform import launcher
from fire_megatron.platform.folder_lock import alone_in

if TYPE_CHECKING:
    from fire_megatron.platform.launch import World
    from fire_megatron.platform.watch import Watch


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fire_megatron.train",
        description="Distil several teachers into a student on its own samples (multi-teacher OPD with FiRe).",
        epilog="Overrides are recipe keys: student.parallel.tensor=2 run.steps=100 teachers.math.checkpoint=DIR",
    )
    add_recipe(parser, option=True)
    parser.add_argument("--check", action="store_true", help="check recipe and checkpoints, then leave")
    return parser


def _written(recipe: Recipe) -> list[tuple[str, Path]]:
    """Folders that a run has to hold, with their recipe keys. Another run's holds its checkpoints too."""
    run, checkpoints = Path(recipe.run.dir), checkpoint_folder(recipe)
    if checkpoints.resolve().is_relative_to(run.resolve()):
        return [("run.dir", run)]
    around = [folder for folder in (checkpoints.parent, checkpoints.parent.parent) if (folder / RECIPE_FILE).exists()]
    return [("run.dir", run), *(("checkpoint.dir", folder) for folder in (checkpoints, *around))]


def _in_use(key: str, folder: Path, holder: str) -> RecipeError:
    return RecipeError(f"{key}: {holder} writes in {folder}; wait for it to end, or give this run a folder of its own")


def _check(path: str, recipe: Recipe) -> None:
    """Check all that a run checks before it builds a model, and say what was read.

    Raises:
        UserError: what is wrong.
    """
    from fire_megatron.platform.device import select_device
    from fire_megatron.train import inputs

    ranks = launcher.launched_world_size()
    _, _, read = inputs.check(recipe, device=select_device(recipe.run.device), num_ranks=ranks)
    for note in read.notes:
        print(note)
    print(f"{path}: no problem found for {ranks} ranks (weights were not read)")


def _train(recipe: Recipe, world: World) -> None:
    """Train, with an eye on the other ranks."""
    from fire_megatron.train.inputs import rank_roles
    from fire_megatron.train.interrupt import StopRequest
    from fire_megatron.train.lifecycle import Trainer
    from fire_megatron.train.status import note_failure

    def note(reason: str, *, hopeless: bool = False) -> None:
        if world.is_main or hopeless:
            note_failure(Path(recipe.run.dir), reason, hopeless=hopeless)

    def train(watch: Watch) -> None:
        stop = StopRequest().install()  # loading takes its time, and what asks to stop may not ask again
        Trainer(recipe, world, watch, stop).train()

    held = rank_roles(recipe, world)
    supervised(world, train, held=held, timeout=recipe.run.collective_timeout, note=note)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe.

    Exit codes: 0 done, or stopped on request with everything saved that was sound, 2 a mistake in the input, 3 another
    rank has died or failed, 130 interrupted twice or before there was anything to save.
    """
    args = _parser().parse_intermixed_args(argv)

    def read() -> Recipe:
        recipe = load_recipe(args.recipe, args.overrides)
        check_recipe(recipe, world_size=launcher.launched_world_size())
        if not args.check and launcher.launched_rank() == 0:
            for key, folder in _written(recipe):
                with writing_to(folder, key):
                    held.enter_context(alone_in(folder, partial(_in_use, key, folder)))
        return recipe

    def work(recipe: Recipe) -> None:
        from fire_megatron.platform import launch  # torch takes seconds to import; mistakes in a recipe should not

        if not args.check:
            settings = recipe.run
            world = launch.start(
                settings.device,
                timeout=settings.collective_timeout,
                threads=settings.threads,
                records=Path(settings.dir) / "flight_recorder",
            )
            _train(recipe, world)
        elif launcher.launched_rank() == 0:
            _check(args.recipe, recipe)

    with ExitStack() as held:
        return run_command(read, work)
