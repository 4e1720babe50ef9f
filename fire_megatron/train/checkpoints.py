"""The checkpoints of a run: which one to continue from, and when and what to save."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from fire_megatron.checkpoint.resuming import TrainingState, load_training_state
from fire_megatron.checkpoint.steps import find_saved, saved_steps, set_damaged_aside
from fire_megatron.checkpoint.torch_dist import read_common
from fire_megatron.config.checkpoints import WEIGHTS, checkpoint_folder, read_marker
from fire_megatron.config.errors import CheckpointError, DamagedCheckpoint, RecipeError, on_every_rank
from fire_megatron.config.schema import Recipe
from fire_megatron.data.prompts import fingerprint
from fire_megatron.metrics.jsonl import METRICS_FILE
from fire_megatron.metrics.logger import RECIPE_FILE
from fire_megatron.platform.launch import World
from fire_megatron.platform.rng import get_rng_state, set_rng_state
from fire_megatron.train.provenance import Provenance
from fire_megatron.train.run import Run


@dataclass(frozen=True)
class Beginning:
    """What the first rank finds at a start; the others, which may see a shared folder otherwise, take it from there."""

    found: list[Path]
    """Folders of the complete steps, the newest first."""
    begun: datetime
    """When the run was, at its first start."""
    provenance: Provenance
    """What it is trained with from here on."""
    before: Provenance | None
    """What the newest state was trained with; None where there is none, or it does not say."""

    @classmethod
    def of(cls, recipe: Recipe) -> Beginning:
        """Look. Raises CheckpointError: a role's checkpoint cannot be read."""
        found = find_saved(checkpoint_folder(recipe))
        extra, begun = _newest_extra(found), datetime.now()
        if "begun" in extra:
            begun = datetime.fromisoformat(extra["begun"])
        elif found and (first := Path(recipe.run.dir) / RECIPE_FILE).exists():  # of a version that did not record it
            begun = datetime.fromtimestamp(first.stat().st_mtime)
        return cls(found, begun, Provenance.of(recipe), Provenance.saved(extra))


def _newest_extra(found: list[Path]) -> dict[str, Any]:
    """The trainer's own values in the newest state that can be read."""
    for folder in found:
        with contextlib.suppress(CheckpointError):
            return read_common(folder / WEIGHTS).get("extra", {})
    return {}


class Checkpoints:
    """Of one run, seen from one rank."""

    def __init__(self, recipe: Recipe, world: World, say: Callable[[str], None], beginning: Beginning) -> None:
        """See whether the run may go on from what there is.

        Args:
            recipe: of the run.
            world: this process's place.
            say: tells people something.
            beginning: as the first rank sees it.

        Raises:
            RecipeError: ``run.resume``, or the student, does not fit what is there; on the ranks that find it so.
            CheckpointError: another rank does not see the folder.
        """
        self.recipe, self.world, self.say = recipe, world, say
        self.folder = checkpoint_folder(recipe)
        self.found, self._beginning = beginning.found, beginning
        self._fingerprint = ""
        self.saved = 0
        """Last step of which a save has begun, or that the run continues from."""
        mode, newest = recipe.run.resume, self.found[0] if self.found else None
        if mode == "must" and newest is None:
            raise RecipeError(f"run.resume is 'must' but {self.folder} holds no complete checkpoint; use 'auto'")
        run_dir = Path(recipe.run.dir)
        if mode == "never" and (newest is not None or (run_dir / METRICS_FILE).exists()):
            raise RecipeError(
                f"run.resume is 'never' but {run_dir} already holds a run; choose another run.dir or use 'auto'"
            )
        if newest is not None and beginning.before is not None:
            beginning.provenance.require_student(beginning.before, newest)
        if newest is not None and not newest.is_dir():
            raise CheckpointError(
                f"{newest}: rank 0 sees it and rank {world.rank} does not; checkpoint.dir must be one folder "
                "for all ranks"
            )

    def newest(self) -> int | None:
        """The newest complete step, by this rank's view of the folder."""
        return max(saved_steps(self.folder), default=None)

    def resume(self, run: Run) -> TrainingState | None:
        """Load the newest step that is not damaged. Collective over the student's ranks.

        Returns:
            What to continue with; None where there is nothing.

        Raises:
            DamagedCheckpoint: all of them are damaged.
            UserError: the run cannot go on from the newest that is whole.
        """
        damaged: list[tuple[Path, str]] = []
        for folder in self.found:
            try:
                state = load_training_state(folder, run.student.model, run.student.optimizer, grid=run.grid)
            except DamagedCheckpoint as error:
                damaged.append((folder, str(error)))
                continue
            self._require_same_order(folder, state.extra["order"], run)
            set_rng_state(state.rng, device=self.world.device)
            self._leave_out(damaged)
            self.saved = state.step
            self.say(f"resumed from {folder} after step {state.step}")
            before = Provenance.saved(state.extra)
            changes = before and self._provenance(run).changes(before, state.step)
            if changes:
                self.say(f"changed since step {state.step}: {changes}")
            self._tell_format(folder)
            return state
        if damaged:
            told = "\n".join(text for _, text in damaged)
            error = DamagedCheckpoint(
                f"none of the checkpoints in {self.folder} is whole, so the run does not start:\n{told}\n"
                "restore one of them from a copy, or start anew with another run.dir"
            )
            raise on_every_rank(error)
        return None

    def _tell_format(self, folder: Path) -> None:
        """A step fits any format, so a run continues in another, which may be unintended where a recipe leaves
        it to the device, or to the defaults of a version."""
        saved, now = (read_marker(folder) or {}).get("dtype"), self.recipe.student.precision.dtype
        if saved not in (None, now):
            self.say(
                f"WARNING: student.precision.dtype: {folder} was trained in {saved} and the run goes on in {now}; to "
                f"go on as before, stop it and set student.precision.dtype={saved} (left out, it is bfloat16 on a GPU "
                "and float32 on a CPU), and teachers.NAME.precision.dtype of those that were in it too"
            )

    def _leave_out(self, damaged: list[tuple[Path, str]]) -> None:
        """Damaged steps are neither counted among those to keep nor in the way of the step that will be saved again."""
        for folder, why in damaged if self.world.is_main else ():
            self.say(f"{why}\n{folder} is damaged and is now {set_damaged_aside(folder)}; the step before it is taken")

    def save(self, run: Run, step: int, extra: dict[str, Any]) -> None:
        """Save a completed step. Collective over the student's ranks.

        Raises:
            CheckpointError: on every rank, if it, or the step saved in the background before it, cannot be written.
        """
        run.saver.save(
            step,
            run.student.model,
            run.student.optimizer,
            rng=get_rng_state(device=self.world.device),
            extra={
                **extra,
                **self._provenance(run).record(),
                "order": self._order(run),
                "begun": self._beginning.begun.isoformat(),
            },
        )
        self.saved = step

    def _provenance(self, run: Run) -> Provenance:
        return replace(self._beginning.provenance, held_out=fingerprint(run.inputs.held_out))

    def _order(self, run: Run) -> dict[str, Any]:
        """What fixes the prompts of every step, by recipe key."""
        recipe = self.recipe
        self._fingerprint = self._fingerprint or fingerprint(run.inputs.prompts)  # hashes every prompt, so once a run
        return {
            "data.train": self._fingerprint,
            "data.shuffle": recipe.data.shuffle,
            "rollout.prompts_per_step": recipe.rollout.prompts_per_step,
            "run.seed": recipe.run.seed,
        }

    def _require_same_order(self, checkpoint: Path, saved: dict[str, Any], run: Run) -> None:
        now = self._order(run)
        for key in (key for key in now if now[key] != saved[key]):
            was = "other prompts" if key == "data.train" else f"{saved[key]!r}, and is now {now[key]!r}"
            raise RecipeError(
                f"{key}: {checkpoint} was trained with {was}, so the steps to come would repeat or skip prompts; "
                "restore it, or start a new run.dir from the exported student"
            )
