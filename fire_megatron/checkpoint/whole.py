"""Opening a checkpoint as a whole: what can be said of it from its metadata and file sizes, without a model."""

from __future__ import annotations

from pathlib import Path

from fire_megatron.checkpoint.folder import WEIGHTS, require_checkpoint
from fire_megatron.checkpoint.maps import tensor_map
from fire_megatron.checkpoint.torch_dist import ShardReader
from fire_megatron.config.errors import CheckpointError
from fire_megatron.config.hf_config import ModelShape


def open_whole(folder: str | Path, shape: ModelShape) -> ShardReader:
    """Open a checkpoint that holds the whole of a model; reads metadata and file sizes only, and needs no model.

    Raises:
        CheckpointError: it is incomplete or cut short, or its tensors are not those that config.json describes.
    """
    reader = ShardReader(require_checkpoint(folder) / WEIGHTS)
    reader.check_files()
    tensors = tensor_map(shape)
    missing = [t.key for t in tensors if t.key not in reader.tensors]
    if missing:
        raise CheckpointError(
            f"{reader.folder}: {len(missing)} tensors are missing, such as {missing[0]}; does config.json belong to "
            "these weights? If so, convert it again"
        )
    for tensor in tensors:
        stored = reader.tensors[tensor.key].shape
        if stored != tensor.shape:
            raise CheckpointError(
                f"{reader.folder}: {tensor.key} has shape {stored} and config.json says {tensor.shape}; "
                "does config.json belong to these weights?"
            )
    return reader
