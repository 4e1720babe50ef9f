"""Loading a converted checkpoint, or a step of an earlier run, into a built model in any layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fire_megatron.checkpoint.maps import output_key
from fire_megatron.checkpoint.quantized import is_quantized, quantize_into
from fire_megatron.checkpoint.shards import Shard, by_parameter, model_shards
from fire_megatron.checkpoint.torch_dist import ShardReader
from fire_megatron.checkpoint.whole import open_tensors, open_whole
from fire_megatron.config.hf_config import ModelShape
from fire_megatron.models.gpt import FireGPT
from fire_megatron.parallel.collectives import on_all_ranks
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.platform.watch import tick


def global_shapes(shards: Sequence[Shard], prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that shards are parts of, by their keys in a checkpoint."""
    return {prefix + shard.key: shard.global_shape for shard in shards}


def open_checkpoint(folder: str | Path, shards: Sequence[Shard], *, grid: ModelGrid) -> ShardReader:
    """Open a checkpoint once every rank of the grid finds it whole. Collective: one exchange of verdicts.

    Raises:
        CheckpointError: on every rank, if any rank finds it incomplete, cut short or unfit for the model.
    """
    return on_all_ranks(open_tensors, folder, global_shapes(shards), group=grid.span)


def read_parameter(
    reader: ShardReader, parameter: torch.nn.Parameter, parts: Sequence[Shard], *, masters: str = ""
) -> None:
    """Fill a parameter from its parts' places in a checkpoint, cast to its dtype; a quantised one is quantised.

    Args:
        reader: of the checkpoint.
        parameter: one of the model's.
        parts: all its shards.
        masters: prefix of the float32 weights that an optimizer quantised the parameter from, where the checkpoint has
            them; read for quantised parameters only, so that these come out as they were.

    Raises:
        CheckpointError: a part cannot be read.
    """
    if not is_quantized(parameter):
        for shard in parts:
            reader.read_into(shard.view, shard.key, offset=shard.offset)
        return
    exact = bool(masters) and masters + parts[0].key in reader.tensors
    dtype = torch.float32 if exact else parameter.dtype
    values = torch.empty(parameter.shape, dtype=dtype, device=parameter.device)
    for shard in parts:
        key = masters + shard.key if exact else shard.key
        reader.read_into(shard.within(values), key, offset=shard.offset)
    quantize_into(parameter, values)


def load_weights(model: FireGPT, folder: str | Path, *, grid: ModelGrid) -> None:
    """Fill this rank's part of a model, cast to the model's dtype; rows of vocabulary padding become zero.

    Collective over the grid. Each rank reads the stored tensors that it holds parts of, one at a time; peak extra
    memory is the largest of them.

    Raises:
        CheckpointError: on every rank alike, if the checkpoint is not usable; what can be told from metadata and file
            sizes is found before any weight is read.
    """
    shards = model_shards(model, grid=grid)
    reader = open_checkpoint(folder, shards, grid=grid)

    def read() -> None:
        with torch.no_grad():
            for parameter, parts in by_parameter(shards):
                tick()
                read_parameter(reader, parameter, parts)

    on_all_ranks(read, group=grid.span)


def load_output_rows(weight: torch.Tensor, folder: str | Path, shape: ModelShape, *, first_row: int) -> None:
    """Fill ``weight`` [V, H] with the rows of a model's output layer from ``first_row`` on, cast to its dtype.

    Raises:
        CheckpointError: the checkpoint is not usable.
    """
    reader = open_whole(folder, shape)
    reader.read_into(weight, output_key(shape), offset=(first_row, 0))
