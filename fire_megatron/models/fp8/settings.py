"""FP8 by Transformer Engine: a role's ``precision.fp8`` as megatron-core's settings, what it asks of a machine,
and the context in which a model's layers run.

megatron-core takes the ranks that share largest magnitudes (amax) from its global ``parallel_state``, which is never
set up here; Transformer Engine would then reduce over the whole world, other roles' ranks included. So megatron-core's
``get_fp8_context`` is replaced by one that finds the ranks with the model's own config.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import fp8_utils
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from fire_megatron.config.schema import RoleConfig

_SCOPE = "fire_fp8"
_SUPPORT = {
    "delayed": ("is_fp8_available",),
    "tensorwise": ("is_fp8_available",),
    "blockwise": ("is_fp8_available", "is_fp8_block_scaling_available"),
    "mxfp8": ("is_fp8_available", "is_mxfp8_available"),
}
"""Transformer Engine's own questions about this GPU, CUDA and cuBLAS, by recipe."""


def fp8_settings(role: RoleConfig) -> dict[str, Any]:
    """TransformerConfig's fields for a role's FP8; the same in megatron-core 0.16 and 0.19."""
    fp8 = role.precision.fp8
    if fp8 is None or fp8.emulate:
        return {}
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8.param_gather,
        "fp8_margin": fp8.margin,
        "fp8_amax_history_len": fp8.amax_history,
        "fp8_amax_compute_algo": fp8.amax_algorithm,
        "first_last_layers_bf16": fp8.first_last_bf16 > 0,
        "num_layers_at_start_in_bf16": fp8.first_last_bf16,
        "num_layers_at_end_in_bf16": fp8.first_last_bf16,
    }


def unsupported(recipe: str) -> str | None:
    """Why this GPU, CUDA or Transformer Engine has no such recipe; None when it has. Imports Transformer Engine."""
    from transformer_engine import pytorch as engine

    for name in _SUPPORT[recipe]:
        question = getattr(engine, name, None)
        if question is None or not hasattr(engine, "autocast"):
            return "this Transformer Engine is too old"
        works, reason = question(return_reason=True)
        if not works:
            return reason
    return None


def token_multiple(config: TransformerConfig) -> int:
    """What the tokens of a pack must be a multiple of: sequence parallelism splits them over the tensor ranks, and FP8
    multiplies in blocks of them. Under context parallelism this holds for each rank's part."""
    ranks = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return ranks * (fp8_utils.get_fp8_align_size(config.fp8_recipe) if config.fp8 else 1)


def shares_amax(config: TransformerConfig) -> bool:
    """Whether every forward and backward pass in training is a collective of all ranks of a pipeline stage: delayed
    scaling puts largest magnitudes together as each pass ends. Passes without gradients do not."""
    return bool(config.fp8) and config.fp8_recipe == "delayed"


class _Scope:
    """Where a model's FP8 context finds what it needs; a copy of the config keeps it, since groups cannot be copied."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.paused = False

    def __deepcopy__(self, memo: dict) -> _Scope:
        return self


def own_amax_group(config: TransformerConfig, groups: ProcessGroupCollection) -> None:
    """Let this model's largest magnitudes be put together over its own ranks: those of a pipeline stage, or its tensor
    and context ranks with ``megatron.tp_only_amax_red``. To be called before the model is built."""
    if config.fp8:
        setattr(config, _SCOPE, _Scope(groups.tp_cp if config.tp_only_amax_red else groups.tp_dp_cp))


@contextlib.contextmanager
def paused(config: TransformerConfig) -> Iterator[None]:
    """Inside, a model's layers compute in ``precision.dtype``. FP8 weights are read as what they stand for."""
    scope = getattr(config, _SCOPE, None)
    if scope is None:
        yield
        return
    before, scope.paused = scope.paused, True
    try:
        yield
    finally:
        scope.paused = before


def release_quantized_weights(model: torch.nn.Module) -> None:
    """Give up the FP8 copies of weights, which Transformer Engine keeps from micro-batch to micro-batch. The first
    micro-batch of the next pass makes them again in any case; meanwhile other roles may need the memory."""
    for module in model.modules():
        copies = getattr(module, "_fp8_workspaces", None)
        if copies:
            copies.clear()


def fp8_context(
    config: TransformerConfig, layer_no: int = -1, is_init: bool = False
) -> contextlib.AbstractContextManager:
    """megatron-core's ``get_fp8_context`` with the model's own ranks.

    Args:
        config: the model's.
        layer_no: global number of a layer from 0 on; -1 for all layers together.
        is_init: the context to build a layer in, where ``fp8_param`` makes its weights FP8.
    """
    if is_init or not config.fp8:
        return _megatrons(config, layer_no, is_init)
    scope: _Scope = getattr(config, _SCOPE)
    if scope.paused or fp8_utils.is_first_last_bf16_layer(config, layer_no):
        return contextlib.nullcontext()
    from transformer_engine.pytorch import autocast

    return autocast(enabled=True, recipe=fp8_utils.get_fp8_recipe(config), amax_reduction_group=scope.group)


_megatrons = fp8_utils.get_fp8_context


def _take_its_place() -> None:
    """Everywhere that megatron-core has imported its function by name; what it imports later comes from fp8_utils."""
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and vars(module).get("get_fp8_context") is _megatrons:
            module.get_fp8_context = fp8_context  # type: ignore[attr-defined]


_take_its_place()
