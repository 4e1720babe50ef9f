"""Saving and resuming a run: weights, optimizer, random generators, place in the data.

A step is saved to a temporary folder beside its place and renamed when everything in it is on the disk, so that a
process killed at any moment leaves the earlier steps as they were. A step folder is a checkpoint like any other:
it can be named as a role's ``checkpoint`` and exported to Hugging Face.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from fire_megatron.checkpoint.amax import read_amax, write_amax
from fire_megatron.checkpoint.files import (
    MARKER,
    WEIGHTS,
    aside,
    carry_files,
    fsync_tree,
    read_marker,
    remove_folder,
    swap_in,
    write_json,
)
from fire_megatron.checkpoint.load import check_tensors, open_checkpoint, read_parameter
from fire_megatron.checkpoint.optimizer_state import (
    MASTER,
    initialise,
    own_slice,
    set_steps_taken,
    state_names,
    steps_taken,
    whole_state,
)
from fire_megatron.checkpoint.quantized import is_quantized
from fire_megatron.checkpoint.shards import Shard, by_parameter, model_shards
from fire_megatron.checkpoint.torch_dist import ShardReader, ShardWriter, read_common, write_metadata
from fire_megatron.config.errors import CheckpointError
from fire_megatron.models.gpt import FireGPT
from fire_megatron.parallel.collectives import all_gather_objects, raise_on_any
from fire_megatron.parallel.grid import ModelGrid

_STEP = re.compile(r"(?:\.old_)?step_(\d+)")
_LEFT_OVER = re.compile(r"\.(tmp|old|gone)_(step_\d+)")
_OPTIMIZER = "optimizer."


@dataclass(frozen=True)
class TrainingState:
    """What a run continues with besides weights and optimizer."""

    step: int
    """Steps completed."""
    rng: dict[str, Any]
    """Generator states of the rank that wrote."""
    extra: dict[str, Any]
    """The trainer's own values."""


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


def find_latest(checkpoints: Path) -> Path | None:
    """The newest complete step, or None."""
    steps = _complete_steps(checkpoints)
    return steps[max(steps)] if steps else None


def _tidy(checkpoints: Path) -> None:
    """Undo what a killed process left of its saving or deleting: parts are deleted, and a complete step that had been
    set aside goes back to its place."""
    for left in checkpoints.glob(".*_step_*"):
        kind = _LEFT_OVER.fullmatch(left.name)
        target = kind and checkpoints / kind[2]
        if kind and kind[1] == "old" and not target.exists() and read_marker(left) is not None:
            left.rename(target)
        elif kind:
            shutil.rmtree(left, ignore_errors=True)


def _write_shards(writer: ShardWriter, shards: list[Shard], optimizer: MegatronOptimizer) -> None:
    """Write what this rank is to write. The ranks that hold the same parameter take turns as writers, one a parameter.
    Quantised weights are written as what they were quantised from, so that any run or export can go on from them.

    Raises:
        OSError: this rank cannot write; only after its part in the other ranks' reduces.
    """
    failure = None

    def write(key: str, shard: Shard, part: torch.Tensor) -> None:
        nonlocal failure
        real = shard.real(part)
        if real.numel() and failure is None:
            try:
                writer.write(key, real, offset=shard.offset, global_shape=shard.global_shape)
            except OSError as error:
                failure = error

    for turn, (parameter, parts) in enumerate(by_parameter(shards)):
        group = parts[0].replicas
        owner = turn % group.size()
        mine = group.rank() == owner
        writes = [shard for shard in parts if shard.writes]
        quantized = is_quantized(parameter)
        for shard in writes if mine and not quantized else ():
            write(shard.key, shard, shard.view)
        for name, whole in whole_state(optimizer, parameter, group=group, owner=owner):
            for shard in writes if mine and whole is not None else ():
                write(f"{_OPTIMIZER}{name}.{shard.key}", shard, shard.within(whole))
                if quantized and name == MASTER:
                    write(shard.key, shard, shard.within(whole).to(parameter.dtype))
    if failure is not None:
        raise failure


def save_training_state(
    checkpoints: Path,
    step: int,
    model: FireGPT,
    optimizer: MegatronOptimizer,
    *,
    rng: dict[str, Any],
    extra: dict[str, Any],
    source: Path,
    keep: int,
    grid: ModelGrid,
) -> Path:
    """Save a completed step. Collective over the grid.

    Args:
        checkpoints: folder of the run's checkpoints, seen by all ranks.
        step: steps completed.
        model: this rank's stage.
        optimizer: the student's.
        rng: this rank's generator states; the first rank's are kept.
        extra: the trainer's values, the same on every rank: tensors, numbers, text, and lists and mappings of them.
        source: checkpoint folder whose config and tokenizer go along.
        keep: newest steps to keep; older ones are deleted after this one is complete.
        grid: the student's.

    Raises:
        CheckpointError: on every rank, if any rank cannot write; earlier checkpoints are untouched.
    """
    target = step_folder(checkpoints, step)
    temporary = checkpoints / f".tmp_{target.name}"
    first = grid.span.rank() == 0
    _attempt(lambda: _fresh_folder(temporary) if first else None, target, grid)
    initialise(optimizer)  # before the first update there is nothing, which saves as zeros

    def write() -> list:
        with ShardWriter(temporary / WEIGHTS, rank=grid.span.rank()) as writer:
            _write_shards(writer, model_shards(model, grid=grid), optimizer)
            if grid.pg.tp_dp_cp.rank() == 0:
                write_amax(writer, model)
            return writer.close()

    entries = [e for part in all_gather_objects(_attempt(write, target, grid), group=grid.span) for e in part]
    common = {"step": step, "optimizer_steps": steps_taken(optimizer), "rng": rng, "extra": extra}

    def complete() -> None:
        write_metadata(temporary / WEIGHTS, entries, common=common)
        # Other ranks' files as this rank sees them: a folder that is not shared between nodes is found out here.
        ShardReader(temporary / WEIGHTS).check_files()
        carry_files(source, temporary)
        marker = read_marker(source) or {}
        write_json(temporary / MARKER, marker | {"step": step, "dtype": str(model.config.params_dtype).split(".")[1]})
        fsync_tree(temporary)
        swap_in(temporary, target)
        for old in saved_steps(checkpoints)[:-keep]:
            remove_folder(step_folder(checkpoints, old))

    _attempt(lambda: complete() if first else None, target, grid)
    return target


def _fresh_folder(folder: Path) -> None:
    _tidy(folder.parent)
    (folder / WEIGHTS).mkdir(parents=True)


def _attempt(action: Any, target: Path, grid: ModelGrid) -> Any:
    """Run a rank's part of the writing; if the file system refuses any rank, all ranks raise."""
    problem, result = None, None
    try:
        result = action()
    except (OSError, CheckpointError) as error:
        problem = (
            f"{target}: cannot be written ({error}); earlier checkpoints are untouched; checkpoint.dir must have room "
            "and be one folder for all ranks"
        )
    raise_on_any(problem, CheckpointError, group=grid.span)
    return result


def load_training_state(
    folder: Path, model: FireGPT, optimizer: MegatronOptimizer, *, grid: ModelGrid
) -> TrainingState:
    """Continue from a saved step, in the layout that it was saved in or any other. Collective over the grid.

    Raises:
        CheckpointError: on every rank alike, if the step is damaged or was not saved by a run.
    """
    shards = model_shards(model, grid=grid)
    reader = open_checkpoint(folder, shards, grid=grid)
    problem, common = None, None
    try:
        for name in ("exp_avg", "exp_avg_sq"):
            check_tensors(reader, shards, f"{_OPTIMIZER}{name}.")
        common = read_common(folder / WEIGHTS)
    except CheckpointError as error:
        problem = f"{error} (to start anew from its weights, name it as student.checkpoint of another run.dir)"
    raise_on_any(problem, CheckpointError, group=grid.span)
    assert common is not None
    initialise(optimizer)
    try:
        with torch.no_grad():
            for parameter, parts in by_parameter(shards):
                read_parameter(reader, parameter, parts, masters=f"{_OPTIMIZER}{MASTER}.")
                _read_state(reader, parameter, parts, optimizer)
            read_amax(reader, model)
    except CheckpointError as error:
        problem = str(error)
    raise_on_any(problem, CheckpointError, group=grid.span)
    set_steps_taken(optimizer, common["optimizer_steps"])
    return TrainingState(common["step"], common["rng"], common["extra"])


def _read_state(
    reader: ShardReader, parameter: torch.nn.Parameter, parts: list[Shard], optimizer: MegatronOptimizer
) -> None:
    mine = own_slice(optimizer, parameter)
    for name in state_names(parameter) if mine.tensors else ():
        whole = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        for shard in parts:
            key = f"{_OPTIMIZER}{name}.{shard.key}"
            # A float32 run keeps no separate master copy: its weights are the masters.
            reader.read_into(shard.within(whole), key if key in reader.tensors else shard.key, offset=shard.offset)
        mine.tensors[name].copy_(whole.view(-1)[mine.start : mine.end])
