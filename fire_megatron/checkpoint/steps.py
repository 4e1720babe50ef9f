"""The folder of a run's checkpoints: which steps it holds, and what killed processes have left in it.

A step folder is a checkpoint like any other: it can be named as a role's ``checkpoint`` and exported to Hugging Face.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from fire_megatron.config.checkpoints import read_marker
from fire_megatron.platform.files import aside, remove_folder

OPTIMIZER = "optimizer."
"""Prefix of the optimizer's tensors."""
_STEP = re.compile(r"(?:\.old_)?step_(\d+)")
_LEFT_OVER = re.compile(r"\.(tmp|old|gone)_(step_\d+)")


def step_folder(checkpoints: Path, step: int) -> Path:
    """Place of a step."""
    return checkpoints / f"step_{step:06d}"


def _complete_steps(checkpoints: Path) -> dict[int, Path]:
    """Steps saved completely and their folders. A step that was being saved once more when the process was killed
    may lie aside; temporary and unfinished folders do not count."""
    if not checkpoints.is_dir():
        return {}
    steps: dict[int, Path] = {}
    for step in {int(match[1]) for path in checkpoints.iterdir() if (match := _STEP.fullmatch(path.name))}:
        target = step_folder(checkpoints, step)
        for folder in (target, aside(target)):
            if step not in steps and read_marker(folder) is not None:
                steps[step] = folder
    return steps


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps saved completely, ascending."""
    return sorted(_complete_steps(checkpoints))


def find_saved(checkpoints: Path) -> list[Path]:
    """Folders of the complete steps, the newest first."""
    steps = _complete_steps(checkpoints)
    return [steps[step] for step in sorted(steps, reverse=True)]


def find_latest(checkpoints: Path) -> Path | None:
    """The newest complete step, or None."""
    return next(iter(find_saved(checkpoints)), None)


def delete_old_steps(checkpoints: Path, *, keep: int) -> None:
    """Leave the newest complete steps."""
    for old in saved_steps(checkpoints)[:-keep]:
        remove_folder(step_folder(checkpoints, old))


def set_damaged_aside(folder: Path) -> Path:
    """Rename a step that turned out to be damaged, so that it is neither read nor counted any more; returns the new
    name."""
    name = folder.name.removeprefix(".old_")
    number = 0
    while (target := folder.with_name(f"damaged_{name}" + (f"_{number}" if number else ""))).exists():
        number += 1
    return folder.rename(target)


def tidy(checkpoints: Path) -> None:
    """Undo what a killed process left of its saving or deleting: parts are deleted, and a complete step that had been
    set aside goes back to its place."""
    for left in checkpoints.glob(".*_step_*"):
        kind = _LEFT_OVER.fullmatch(left.name)
        target = kind and checkpoints / kind[2]
        if kind and kind[1] == "old" and not target.exists() and read_marker(left) is not None:
            left.rename(target)
        elif kind:
            shutil.rmtree(left, ignore_errors=True)
