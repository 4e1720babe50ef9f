"""Opening a checkpoint as a whole: what can be said of it from its metadata and file sizes, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fire_megatron.checkpoint.maps import tensor_map
from fire_megatron.checkpoint.torch_dist import ShardReader
from fire_megatron.config.checkpoints import WEIGHTS
from fire_megatron.config.errors import CheckpointError
from fire_megatron.config.hf_config import ModelShape


def open_tensors(folder: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> ShardReader:
    """Open a checkpoint that holds these tensors; reads metadata and file sizes only.

    Args:
        folder: of a converted checkpoint.
        shapes: of the tensors, by their keys.

    Raises:
        CheckpointError: it is incomplete or cut short, or tensors are missing or have another shape.
    """
    reader = ShardReader(Path(folder) / WEIGHTS)
    reader.check_files()
    require_tensors(reader, shapes)
    return reader


def require_tensors(reader: ShardReader, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """See :func:`open_tensors`."""
    missing = sorted(shapes.keys() - reader.tensors.keys())
    if missing:
        raise CheckpointError(
            f"{reader.folder}: {len(missing)} tensors are missing, such as {missing[0]}; does config.json belong to "
            "these weights? If so, convert it again"
        )
    for key, shape in shapes.items():
        stored = reader.tensors[key].shape
        if stored != shape:
            raise CheckpointError(
                f"{reader.folder}: {key} has shape {stored} and the model needs {shape}; does config.json belong to "
                "these weights?"
            )


def open_whole(folder: str | Path, shape: ModelShape) -> ShardReader:
    """Open a checkpoint that holds the whole of a model; see :func:`open_tensors`."""
    return open_tensors(folder, {tensor.key: tensor.shape for tensor in tensor_map(shape)})
