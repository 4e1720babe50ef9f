"""The folder of a run: its recipe, its status, its metrics. The first rank of the run writes, the others do nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fire_megatron.config.load import load_recipe, recipe_text, recipe_to_dict
from fire_megatron.config.schema import Recipe
from fire_megatron.metrics.logger import RECIPE_FILE, MetricsLogger, set_aside, writing_to
from fire_megatron.platform import launch
from fire_megatron.platform.files import write_whole
from fire_megatron.platform.launch import World
from fire_megatron.train.status import begin, write_status


class RunFolder:
    """Of one run, seen from one rank."""

    def __init__(self, recipe: Recipe, world: World, say: Callable[[str], None], *, saved: int | None) -> None:
        """Note that the run is under way.

        Args:
            recipe: as used.
            world: this process's place.
            say: tells people something.
            saved: step of the newest checkpoint.

        Raises:
            TrainingError: it has been restarted too often, or another restart would fail too; on the first rank.
            RecipeError: the folder cannot be written.
        """
        self.path = Path(recipe.run.dir)
        self._recipe, self._main, self._say = recipe, world.is_main, say
        if self._main:
            most = recipe.run.max_restarts
            self._status = begin(self.path, saved=saved, restart=launch.restart(), max_restarts=most)
            if self._status.restarts:
                say(f"restart {self._status.restarts} of {most} without a new checkpoint")
            with writing_to(self.path):
                write_status(self.path, self._status)

    def note(self, **changes: object) -> None:
        """Bring ``status.json`` up to date: fields of :class:`RunStatus`."""
        if self._main:
            self._status = replace(self._status, **changes)
            write_status(self.path, self._status)

    def open(self, *, step: int, resumed: bool, logged: int, evaluated: int) -> MetricsLogger:
        """Save the resolved recipe and open the metrics.

        Args:
            step: steps done.
            resumed: whether the run continues from a checkpoint.
            logged: last step whose metrics need not be logged again.
            evaluated: last step whose evaluation need not be made again.

        Raises:
            RecipeError: the folder cannot be written.
        """
        if self._main:
            for path in [] if resumed else set_aside(self.path):
                self._say(f"an earlier run here saved no checkpoint to continue from; its file is now {path}")
            self._save_recipe(step)
        return MetricsLogger(
            self.path,
            self._recipe.metrics,
            total_steps=self._recipe.run.steps,
            start_step=step if resumed else -1,
            logged=logged if resumed else -1,
            evaluated=evaluated if resumed else -1,
            enabled=self._main,
            name=self._recipe.run.name,
            settings=recipe_to_dict(self._recipe),
        )

    def _save_recipe(self, step: int) -> None:
        """The recipe as used; beside the first one where a resumed run has another."""
        first = self.path / RECIPE_FILE
        if first.exists() and load_recipe(first) == self._recipe:
            return
        target = self.path / f"recipe_from_{step:06d}.yaml" if first.exists() else first
        with writing_to(self.path):
            write_whole(target, [recipe_text(self._recipe)])
