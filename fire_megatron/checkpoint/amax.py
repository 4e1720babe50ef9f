"""Scales of delayed FP8 scaling, and the largest magnitudes of earlier steps that they come from, saved with a step.

All ranks of a pipeline stage hold the same, since they put their magnitudes together, so that one of them writes under
the layer's global number and any layout reads. Transformer Engine's own way (``_extra_state``) is a pickle. Scales of
emulated FP8 have names of their own, since they count updates where Transformer Engine counts passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from fire_megatron.checkpoint.torch_dist import ShardReader
from fire_megatron.models.fp8.settings import fp8_context, shares_amax
from fire_megatron.models.gpt import FireGPT

if TYPE_CHECKING:
    from fire_megatron.models.fp8.emulation import Scales

_PREFIX = "fp8."
_EMULATED = ".emulated."
_STATES = ("scaling_fwd", "scaling_bwd")
_TENSORS = ("scale", "amax_history")


def _linear_layers(model: FireGPT) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name with the layer's global number, module) of every layer of Transformer Engine's that multiplies in FP8."""
    for layer in model.decoder.layers if shares_amax(model.config) else ():
        for name, module in layer.named_modules():
            if hasattr(module, "init_fp8_metadata") and any(p.dim() == 2 for p in module.parameters(recurse=False)):
                yield f"{_PREFIX}{layer.layer_number - 1}.{name}", module


def _tensors(key: str, module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the checkpoint, the module's own float32 tensor); none before its first pass."""
    for state in _STATES:
        for tensor in _TENSORS if state in module.fp8_meta else ():
            yield f"{key}.{state}.{tensor}", getattr(module.fp8_meta[state], tensor)


def _scales(model: FireGPT) -> Scales | None:
    """What emulated delayed scaling remembers, where a model has that."""
    return model.emulated_fp8.scales if model.emulated_fp8 is not None else None


def _emulated(model: FireGPT) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the checkpoint, float32 tensor) of emulated scaling; none before the first update's end."""
    scales = _scales(model)
    for key, state in scales.state().items() if scales is not None else ():
        for name, tensor in state.items() if len(state["history"]) else ():
            yield f"{_PREFIX}{key}{_EMULATED}{name}", tensor


def _read_emulated(reader: ShardReader, model: FireGPT) -> None:
    """The part of :func:`read_amax` for emulated scaling, which continues from a history of any length."""
    scales = _scales(model)
    if scales is None:
        return
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key in scales.rows:
        for name in ("scale", "history"):
            stored = f"{_PREFIX}{key}{_EMULATED}{name}"
            if stored in reader.tensors:
                tensor = found.setdefault(key, {})[name] = torch.empty(reader.tensors[stored].shape)
                reader.read_into(tensor, stored, offset=(0,) * tensor.dim())
    scales.load(found)


def amax_tensors(model: FireGPT) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the checkpoint, float32 tensor) of a stage's scales and histories; one of its ranks writes them."""
    yield from _emulated(model)
    for key, module in _linear_layers(model):
        yield from _tensors(key, module)


def read_amax(reader: ShardReader, model: FireGPT) -> None:
    """Continue from a step's scales and histories. A layer whose history has another length, or whose experts are
    spread over other ranks, and all layers after a run without delayed scaling, begin anew.

    Raises:
        CheckpointError: they cannot be read.
    """
    _read_emulated(reader, model)
    for key, module in _linear_layers(model):
        with torch.no_grad(), fp8_context(model.config):  # makes the tensors that a first pass would make
            module.init_fp8_metadata(num_gemms=getattr(module, "num_gemms", 1))
        pairs = list(_tensors(key, module))
        if all(name in reader.tensors and reader.tensors[name].shape == tuple(t.shape) for name, t in pairs):
            for name, tensor in pairs:
                reader.read_into(tensor, name, offset=(0,) * tensor.dim())
