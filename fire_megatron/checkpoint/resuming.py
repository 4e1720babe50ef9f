"""Resuming a run: weights, optimizer, random generators, place in the data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from fire_megatron.checkpoint.amax import read_amax
from fire_megatron.checkpoint.loading import global_shapes, open_checkpoint, read_parameter
from fire_megatron.checkpoint.optimizer_state import MASTER, initialise, own_slice, set_steps_taken, state_names
from fire_megatron.checkpoint.shards import Shard, by_parameter, model_shards
from fire_megatron.checkpoint.steps import OPTIMIZER
from fire_megatron.checkpoint.torch_dist import ShardReader, read_common
from fire_megatron.checkpoint.whole import require_tensors
from fire_megatron.config.checkpoints import WEIGHTS
from fire_megatron.config.errors import CheckpointError, DamagedCheckpoint, on_every_rank
from fire_megatron.models.gpt import FireGPT
from fire_megatron.parallel.collectives import on_all_ranks
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.platform.watch import tick


@dataclass(frozen=True)
class TrainingState:
    """What a run continues with besides weights and optimizer."""

    step: int
    """Steps completed."""
    rng: dict[str, Any]
    """Generator states of the rank that wrote."""
    extra: dict[str, Any]
    """The trainer's own values."""


def load_training_state(
    folder: Path, model: FireGPT, optimizer: MegatronOptimizer, *, grid: ModelGrid
) -> TrainingState:
    """Continue from a saved step, in the layout that it was saved in or any other. Collective over the grid.

    Raises:
        DamagedCheckpoint: on every rank alike, if the step is not what was written. Weights and optimizer may then hold
            a part of it; another step, loaded after it, replaces all of them.
        CheckpointError: the same, if it was not saved by a run, or by one of another model.
    """
    shards = model_shards(model, grid=grid)
    reader = open_checkpoint(folder, shards, grid=grid)

    def look() -> dict[str, Any]:
        try:
            for name in ("exp_avg", "exp_avg_sq"):
                require_tensors(reader, global_shapes(shards, f"{OPTIMIZER}{name}."))
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} (to start anew from its weights, name it as student.checkpoint of another run.dir)"
            ) from error
        return read_common(folder / WEIGHTS)

    def read() -> None:
        with torch.no_grad():
            for parameter, parts in by_parameter(shards):
                tick()
                read_parameter(reader, parameter, parts, masters=f"{OPTIMIZER}{MASTER}.")
                _read_state(reader, parameter, parts, optimizer)
            read_amax(reader, model)

    common = on_all_ranks(look, group=grid.span)
    initialise(optimizer)
    on_all_ranks(read, group=grid.span)
    try:
        state = TrainingState(common["step"], common["rng"], common["extra"])
        set_steps_taken(optimizer, common["optimizer_steps"])
    except (KeyError, TypeError) as error:  # the same file on every rank
        raise on_every_rank(DamagedCheckpoint(f"{folder / WEIGHTS}: common.pt lacks {error}")) from error
    return state


def _read_state(
    reader: ShardReader, parameter: torch.nn.Parameter, parts: list[Shard], optimizer: MegatronOptimizer
) -> None:
    mine = own_slice(optimizer, parameter)
    for name in state_names(parameter) if mine.tensors else ():
        whole = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        for shard in parts:
            key = f"{OPTIMIZER}{name}.{shard.key}"
            # A float32 run keeps no separate master copy: its weights are the masters.
            reader.read_into(shard.within(whole), key if key in reader.tensors else shard.key, offset=shard.offset)
        mine.tensors[name].copy_(whole.view(-1)[mine.start : mine.end])
