"""Where each of a rank's parameters lies within the whole model's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from fire_megatron.checkpoint.quantized import stand_ins
from fire_megatron.models.gpt import FireGPT
from fire_megatron.parallel.grid import ModelGrid

_VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class Shard:
    """A rectangular part of one of the model's tensors, held by this rank."""

    key: str
    """Name of the whole tensor, as in the checkpoint."""
    global_shape: tuple[int, ...]
    """Shape of the whole tensor, vocabulary unpadded."""
    offset: tuple[int, ...]
    """Where the part starts."""
    parameter: torch.nn.Parameter
    """The parameter that it is a part of (half of it, for the gate and the up projection)."""
    view: torch.Tensor
    """The part, sharing the parameter's memory, with as many dimensions as the whole; may reach into the vocabulary's
    padding. Of a quantised parameter only the place of a part, without memory."""
    replicas: dist.ProcessGroup
    """The ranks that hold this very part: the data-parallel ones, of an expert those that hold the expert."""
    writes: bool
    """Whether this rank's place in the tensor and pipeline dimensions is the one that writes the part (a replicated
    norm is written by tensor rank 0 only); data-parallel ranks of one place hold the same and share the duty."""

    def within(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same part of another tensor laid out as the parameter, such as an optimizer moment."""
        start = self.view.storage_offset() - (0 if self.view.is_meta else self.parameter.storage_offset())
        assert tensor.is_contiguous()
        return tensor.as_strided(self.view.shape, self.view.stride(), tensor.storage_offset() + start)

    def real(self, part: torch.Tensor) -> torch.Tensor:
        """``part`` without the rows that lie in the vocabulary's padding."""
        return part[: max(0, min(len(part), self.global_shape[0] - self.offset[0]))]


def _sharded_tensors(entry: object) -> Iterator[ShardedTensor]:
    if isinstance(entry, ShardedTensorFactory):
        parts = entry.build()
        for part in parts.values() if isinstance(parts, dict) else parts:
            yield from _sharded_tensors(part)
    elif isinstance(entry, ShardedTensor):
        yield entry


def model_shards(model: FireGPT, *, grid: ModelGrid) -> list[Shard]:
    """All parts that this rank holds. Layers keep their global numbers, so that any pipeline split reads the same
    names (megatron-core's ``non_homogeneous_layers``). No communication."""
    group = grid.pg.dp_cp
    parameters = dict(model.named_parameters())
    with stand_ins(model):
        state = model.sharded_state_dict(metadata={"non_homogeneous_layers": True, "dp_cp_group": group})
    shards = []
    for name, entry in state.items():
        if name not in parameters:
            continue  # extra state of layers that keep none
        for tensor in _sharded_tensors(entry):
            shape = list(tensor.global_shape)
            if tensor.key in _VOCABULARY_KEYS:
                shape[0] = model.real_vocab_size
            # megatron-core stacks the experts of a layer in one tensor, of which each parameter is a slice.
            view = tensor.data[(None,) * tensor.prepend_axis_num]
            replicas = grid.pg.expt_dp if tensor.prepend_axis_num else group
            shards.append(
                Shard(
                    tensor.key, tuple(shape), tuple(tensor.global_offset), parameters[name], view, replicas,
                    not any(tensor.replica_id[:-1]),  # (pipeline, tensor, data)
                )
            )  # fmt: skip
    held = {id(shard.parameter) for shard in shards}
    forgotten = [name for name, parameter in parameters.items() if id(parameter) not in held]
    assert not forgotten, f"megatron-core's sharded_state_dict leaves out {forgotten}"
    return shards


def by_parameter(shards: Sequence[Shard]) -> Iterator[tuple[torch.nn.Parameter, list[Shard]]]:
    """Shards of each parameter together, in the model's order, which the ranks of a replica share."""
    order: dict[int, list[Shard]] = {}
    for shard in shards:
        order.setdefault(id(shard.parameter), []).append(shard)
    for group in order.values():
        yield group[0].parameter, group
