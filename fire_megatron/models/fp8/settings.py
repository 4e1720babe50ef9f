"""FP8 by Transformer Engine: a role's ``precision.fp8`` as megatron-core's settings, what it asks of a model and of a
machine, and the context in which a model's layers run.

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

from fire_megatron.config.errors import RecipeError
from fire_megatron.config.hf_config import ModelShape
from fire_megatron.config.schema import FP8Config, RoleConfig

SET_BY_PRECISION = (
    "fp8", "fp8_recipe", "fp8_param", "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo",
    "fp8_quantizer_factory", "first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16",
)  # fmt: skip
"""Fields of TransformerConfig that ``precision.fp8`` decides."""

_SCOPE = "fire_fp8"
_SUPPORT = {
    "delayed": ("is_fp8_available",),
    "tensorwise": ("is_fp8_available",),
    "blockwise": ("is_fp8_available", "is_fp8_block_scaling_available"),
    "mxfp8": ("is_fp8_available", "is_mxfp8_available"),
}
"""Transformer Engine's own questions about this GPU, CUDA and cuBLAS, by recipe."""


def engine_fp8(role: RoleConfig) -> FP8Config | None:
    """A role's FP8 settings where Transformer Engine computes in FP8; None without FP8 and where it is emulated."""
    fp8 = role.precision.fp8
    return None if fp8 is None or fp8.emulate else fp8


def fp8_settings(role: RoleConfig) -> dict[str, Any]:
    """TransformerConfig's fields for a role's FP8; the same in megatron-core 0.16 and 0.19."""
    fp8 = engine_fp8(role)
    if fp8 is None:
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


def check_fp8(shape: ModelShape, role: RoleConfig, *, tensor: int, spec: str) -> None:
    """What FP8 asks of the layers, this machine and the model's sizes; nothing where it is off or emulated.

    Args:
        shape: the architecture.
        role: the role's recipe section.
        tensor: tensor-parallel ranks.
        spec: ``local`` or ``te``, as it is used.

    Raises:
        RecipeError: something is missing; the key is relative to the role.
    """
    fp8 = engine_fp8(role)
    if fp8 is None:
        return
    if spec != "te":
        raise RecipeError(
            "precision.fp8: FP8 layers are Transformer Engine's, which is not used here (the layer spec is 'local'); "
            "remove it, run on a GPU with Transformer Engine installed, or set precision.fp8.emulate=true on a CPU"
        )
    reason = unsupported(fp8.recipe)
    if reason:
        raise RecipeError(
            f"precision.fp8.recipe: {fp8.recipe!r} does not work on this machine ({reason}); take another recipe "
            "(tensorwise works on every GPU with FP8), or remove precision.fp8"
        )
    check_fp8_sizes(shape, role, tensor=tensor)


def check_fp8_sizes(shape: ModelShape, role: RoleConfig, *, tensor: int) -> None:
    """What FP8 asks of the model's sizes, on any machine; see :func:`check_fp8`."""
    fp8 = engine_fp8(role)
    if fp8 is None:
        return
    unit = fp8_utils.get_fp8_align_size(fp8.recipe)
    for name, size in _inner_sizes(shape, tensor):
        if size % unit:
            raise RecipeError(
                f"precision.fp8: {fp8.recipe!r} multiplies in blocks of {unit}, which does not divide the model's "
                f"{name} of {size} on each of {tensor} tensor-parallel ranks; lower parallel.tensor, take "
                f"{'recipe tensorwise' if unit > 16 else 'bf16'}, or another model"
            )


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


def _inner_sizes(shape: ModelShape, tensor: int) -> Iterator[tuple[str, int]]:
    """Sizes of a rank's matrices in linear layers, by what they are in words."""
    yield "hidden size", shape.hidden
    yield "query heads", shape.heads * shape.head_dim // tensor
    yield "query, key and value heads", (shape.heads + 2 * shape.kv_heads) * shape.head_dim // tensor
    for experts in sorted({shape.has_experts(layer) for layer in range(shape.num_layers)}):
        if experts and shape.experts:
            yield "experts' FFN", shape.experts.ffn // tensor
        else:
            yield "FFN", shape.ffn // tensor


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
    micro-batch of the next pass makes them anew in any case; meanwhile others may need the memory."""
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
