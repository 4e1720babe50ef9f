"""From a model's shape and a role's recipe section to a megatron-core model on that role's grid."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from fire_megatron.config.errors import RecipeError
from fire_megatron.config.hf_config import ModelShape
from fire_megatron.config.rules.facts import Machine
from fire_megatron.config.schema import PrecisionConfig, RoleConfig
from fire_megatron.config.spans import pipeline_stages
from fire_megatron.models.experts import expert_settings, pass_padding, use_router
from fire_megatron.models.fp8.settings import (
    fp8_settings,
    own_amax_group,
    unsupported,
)
from fire_megatron.models.gpt import FireGPT
from fire_megatron.models.layers import CoreAttention, GatedMLP, RMSNorm
from fire_megatron.models.rotary_angles import RotaryAngles
from fire_megatron.models.self_attention import SelfAttention
from fire_megatron.parallel.grid import Layout, ModelGrid
from fire_megatron.platform.capabilities import detect_capabilities
from fire_megatron.platform.device import Device, compute_device

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def model_dtype(precision: PrecisionConfig, kind: str) -> torch.dtype:
    """Format of weights and activations on a device of kind ``cpu`` or ``cuda``."""
    return _DTYPES[precision.on(kind).dtype]


def padded_vocab_size(vocab_size: int, *, multiple: int, tensor: int) -> int:
    """Smallest multiple of ``multiple * tensor`` that holds the vocabulary."""
    unit = multiple * tensor
    return -(-vocab_size // unit) * unit


def check_megatron_fields(role: str, overrides: Mapping[str, Any]) -> None:
    """Check a role's ``megatron:`` mapping against the installed TransformerConfig.

    Args:
        role: recipe path of the role, e.g. ``teachers.math``, for the message.
        overrides: the mapping.

    Raises:
        RecipeError: a key that TransformerConfig does not have, or a value of a wrong type.
    """
    hints = typing.get_type_hints(TransformerConfig)
    known = {f.name for f in dataclasses.fields(TransformerConfig) if f.init}
    for key, value in overrides.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"{role}.megatron.{key}: megatron-core's TransformerConfig has no such field{hint}")
        if not _fits(value, hints[key]):
            wanted = getattr(hints[key], "__name__", str(hints[key])) if isinstance(hints[key], type) else hints[key]
            raise RecipeError(f"{role}.megatron.{key}: {value!r} does not fit megatron-core's type of it, {wanted}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML fits a type hint of TransformerConfig; classes that YAML cannot hold fit nothing."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (list, tuple):
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if hint is float:
        return type(value) in (int, float)
    return hint in (bool, int, str, list, dict, type(None)) and type(value) is hint


def this_machine(device: Device) -> Machine:
    """What the rules on a recipe ask of the machine that it runs on."""
    engine = detect_capabilities(device)[0]
    return Machine(device.kind, None if engine.version else engine.detail.partition(";")[0], unsupported)


def resolve_layer_spec(setting: str, device: Device) -> str:
    """``local`` or ``te`` from a role's ``layer_spec``."""
    return "te" if setting != "local" and detect_capabilities(device)[0].version else "local"


def _pipeline_settings(num_layers: int, pipeline: int) -> dict[str, int]:
    """megatron-core's fields for stages that do not divide. Its explicit layouts read the global parallel_state
    (transformer/pipeline_parallel_layer_layout.py), so the first and last stage are sized instead."""
    if num_layers % pipeline == 0:
        return {}
    stages = pipeline_stages(num_layers, pipeline)
    return {"num_layers_in_first_pipeline_stage": stages[0], "num_layers_in_last_pipeline_stage": stages[-1]}


def transformer_config(shape: ModelShape, role: RoleConfig, layout: Layout, *, device: Device) -> TransformerConfig:
    """megatron-core's config for this model, layout and precision.

    Raises:
        RecipeError: TransformerConfig rejects the combination.
    """
    dtype = model_dtype(role.precision, device.kind)
    spec = resolve_layer_spec(role.layer_spec, device)
    sequence = layout.tensor > 1 if role.parallel.sequence is None else role.parallel.sequence
    settings: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.kv_heads,
        "kv_channels": shape.head_dim,
        "ffn_hidden_size": shape.ffn,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm,
        "window_size": None if shape.sliding_window is None else (shape.sliding_window - 1, 0),
        "window_attn_skip_freq": [int(i not in shape.full_layers) for i in range(shape.num_layers)],
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "sequence_parallel": sequence and layout.tensor > 1,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        # Rows are packed, so micro-batches differ in length, and losses are sums that train/ has already divided.
        "variable_seq_lengths": True,
        # Messages between stages take their group's communicator, not one for each pair, and no wait of the host.
        "batch_p2p_comm": True,
        "batch_p2p_sync": False,
        "moe_token_dispatcher_type": "alltoall",  # the default refuses variable lengths, experts or not
        "calculate_per_token_loss": True,
        "perform_initialization": False,  # every weight comes from a checkpoint
        # Fusions below are jitted or CUDA kernels.
        "bias_activation_fusion": device.is_cuda and shape.experts is not None,  # GatedMLP does without
        "bias_dropout_fusion": False,  # without bias and dropout it is an addition
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
    }
    settings |= _pipeline_settings(shape.num_layers, layout.pipeline)
    settings |= expert_settings(shape, spec=spec)
    settings |= fp8_settings(role)
    try:
        return TransformerConfig(**{**settings, **role.megatron})
    except (ValueError, TypeError, AssertionError, ImportError) as error:
        raise RecipeError(f"megatron-core rejects this model configuration: {error}") from error


def _layer_spec(config: TransformerConfig, spec: str, experts: bool) -> tuple[ModuleSpec, Any]:
    """A transformer layer and the final norm of a spec, with our router and our core attention in both; in ``te`` it
    leads to Transformer Engine's where that can take over."""
    options = {
        "qk_layernorm": config.qk_layernorm,
        "num_experts": config.num_moe_experts if experts else None,
        "moe_grouped_gemm": config.moe_grouped_gemm if experts else False,
    }
    if spec == "te":
        from megatron.core.extensions.transformer_engine import TENorm

        from fire_megatron.models.te_attention import TEAttention

        layer, norm = get_gpt_layer_with_transformer_engine_spec(**options), TENorm
        core_attention: type[CoreAttention] = TEAttention
    else:
        layer, norm = get_gpt_layer_local_spec(**options), RMSNorm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        core_attention = CoreAttention
    layer.submodules.self_attention.module = SelfAttention
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = core_attention
    if config.qk_layernorm and spec != "te":
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if experts:
        use_router(layer)
        # A layer of experts has no matrix that its norm could be a part of, as the local spec has it for a dense one.
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return layer, norm


def build_model(shape: ModelShape, role: RoleConfig, grid: ModelGrid, *, device: Device) -> FireGPT:
    """Build this rank's part of the model. Weights are uninitialised; :mod:`fire_megatron.checkpoint` loads them.

    Args:
        shape: the architecture.
        role: the role's recipe section (precision, layer spec, ``megatron:`` fields).
        grid: where the role's replicas live.
        device: this process's device.

    Raises:
        RecipeError: see :func:`transformer_config`.
    """
    config = transformer_config(shape, role, grid.layout, device=device)
    own_amax_group(config, grid.pg)
    spec = resolve_layer_spec(role.layer_spec, device)
    first = get_transformer_layer_offset(config, vp_stage=None, pp_rank=grid.pp_rank)
    count = get_num_layers_to_build(config, vp_stage=None, pp_rank=grid.pp_rank)
    layers, norms = zip(
        *(_layer_spec(config, spec, shape.has_experts(i)) for i in range(first, first + count)), strict=True
    )
    model = FireGPT(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=list(layers), layer_norm=norms[0]),
        vocab_size=padded_vocab_size(shape.vocab_size, multiple=role.vocab_multiple, tensor=grid.layout.tensor),
        max_sequence_length=shape.max_positions,
        pre_process=grid.is_first_stage,
        post_process=grid.is_last_stage,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        pg_collection=grid.pg,
        real_vocab_size=shape.vocab_size,
        rotary_angles=RotaryAngles(shape, device=compute_device(), dtype=config.params_dtype),
    )
    for module in model.modules():
        if type(module) is MLP:  # by its class, since each release of megatron-core specifies it in another way
            module.__class__ = GatedMLP
    for layer, number in zip(model.decoder.layers, range(first, first + count), strict=True):
        if shape.has_experts(number):
            pass_padding(layer)
    fp8 = role.precision.fp8
    if fp8 is not None and fp8.emulate:
        from fire_megatron.models.fp8.emulation import EmulatedFP8

        model.emulated_fp8 = EmulatedFP8(
            model.decoder.layers, fp8, num_layers=shape.num_layers, ep_rank=grid.pg.ep.rank()
        )
    return model
