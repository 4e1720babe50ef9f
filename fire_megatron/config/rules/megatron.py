"""Rules on ``megatron``, fields of megatron-core's TransformerConfig that are passed through.

Which fields the installed release has, and their types, models/build.py finds out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from fire_megatron.config.errors import RecipeProblem
from fire_megatron.config.rules.facts import Role

SET_ELSEWHERE: Mapping[str, str] = {
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "context_parallel_size": "parallel.context",
    "expert_model_parallel_size": "parallel.expert",
    "expert_tensor_parallel_size": "parallel.tensor",
    **dict.fromkeys(
        ("hierarchical_context_parallel_sizes", "hybrid_context_parallel", "max_seqlen_per_dp_cp_rank"),
        "parallel.context",
    ),
    "sequence_parallel": "parallel.sequence",
    **dict.fromkeys(("params_dtype", "pipeline_dtype", "bf16", "fp16"), "precision.dtype"),
    **dict.fromkeys(
        (
            "fp8", "fp8_recipe", "fp8_param", "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo",
            "fp8_quantizer_factory", "first_last_layers_bf16", "num_layers_at_start_in_bf16",
            "num_layers_at_end_in_bf16",
        ),
        "precision.fp8",
    ),
    **dict.fromkeys(
        (
            "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size",
            "normalization", "layernorm_epsilon", "gated_linear_unit", "activation_func", "add_bias_linear",
            "add_qkv_bias", "qk_layernorm", "window_size", "window_attn_skip_freq", "multi_latent_attention",
            "num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax", "moe_layer_freq",
            "moe_router_score_function", "moe_router_num_groups", "moe_router_group_topk",
            "moe_router_topk_limited_devices", "moe_router_topk_scaling_factor", "moe_router_enable_expert_bias",
            "moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_shared_expert_overlap",
            "moe_latent_size", "moe_apply_probs_on_input",
        ),
        "checkpoint (the model's own config.json)",
    ),
}  # fmt: skip
"""Fields that other settings decide, and which."""
RELIED_ON = (
    "variable_seq_lengths", "calculate_per_token_loss", "perform_initialization", "batch_p2p_comm", "batch_p2p_sync",
    "overlap_p2p_comm", "use_ring_exchange_p2p",
)  # fmt: skip
"""Fields without which the trainer computes something else."""
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(RELIED_ON, "the trainer relies on its own value"),
    "apply_rope_fusion": "its kernel takes positions from the start of each pack, and rows have positions of their own",
    **dict.fromkeys(
        ("apply_query_key_layer_scaling", "attention_softmax_in_fp32", "softmax_type", "attention_backend"),
        "the core attention is scaled_dot_product_attention and does not read it",
    ),
    "fp8_output_proj": "the loss projects to the vocabulary itself",
    **dict.fromkeys(
        ("hidden_dropout", "attention_dropout"), "log-probabilities are compared between passes, so there is no dropout"
    ),
    **dict.fromkeys(
        (
            "moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity", "moe_token_drop_policy",
            "moe_token_dropping", "moe_expert_rank_capacity_factor", "moe_input_jitter_eps",
        ),
        "a token's log-probability would depend on the tokens beside it, or on chance",
    ),
    **dict.fromkeys(
        ("moe_router_force_load_balancing", "moe_router_force_biased", "moe_enable_routing_replay"),
        "teachers and student are compared on the routing that the checkpoint learned",
    ),
    **dict.fromkeys(
        ("moe_mlp_glu_interleave_size", "moe_single_grouped_weight", "moe_single_grouped_bias", "moe_extended_tp"),
        "checkpoints hold the experts' weights in another arrangement",
    ),
    **dict.fromkeys(
        ("expert_gtp_weight_remat_size", "expert_tensor_parallel_num_weight_shards"),
        "parallel.tensor and parallel.expert say how experts are spread",
    ),
    **dict.fromkeys(
        (
            "moe_per_layer_logging", "moe_router_bias_update_rate", "moe_router_quantile_balancing_ema",
            "moe_shared_expert_glu_interleave_size", "use_grouped_gemm_for_shared_expert",
        ),
        "nothing here reads it",
    ),
    "moe_use_legacy_grouped_gemm": "grouped experts are Transformer Engine's",
    "overlap_moe_expert_parallel_comm": "its schedule runs a forward pass of its own, without packed rows",
}  # fmt: skip
"""Fields that may not be set, and why."""
_COEFFICIENTS = ("moe_aux_loss_coeff", "moe_z_loss_coeff")
_TRAINING_ONLY = (*_COEFFICIENTS, "moe_router_load_balancing_type")
"""Fields that change gradients alone, so that they mean nothing to a teacher."""
ENGINE_ONLY = ("moe_grouped_gemm", "moe_permute_fusion", "moe_router_fusion", "fp4")
"""Fields that turn on Transformer Engine's kernels."""
_CHOICES: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "moe_router_load_balancing_type": (
        ("aux_loss",),
        "packs hold rows of many lengths and replicas differ in their number of micro-batches, so the balance is taken "
        "within a micro-batch",
    ),
    "moe_token_dispatcher_type": (("alltoall", "flex"), "micro-batches differ in length, which allgather refuses"),
}
"""Field -> values that may be set, and why no others."""


def overrides(role: Role) -> Iterator[RecipeProblem]:
    for field, value in role.config.megatron.items():
        text = _refusal(role, field, value)
        if text:
            yield RecipeProblem(role.at(f"megatron.{field}"), text)


def _refusal(role: Role, field: str, value: Any) -> str | None:
    if field in REFUSED:
        return f"{REFUSED[field]}; leave it out"
    if field in SET_ELSEWHERE:
        return f"this is set by {role.at(SET_ELSEWHERE[field])}; leave it out"
    if field.startswith("moe_") and role.shape and role.shape.experts is None:
        return "the model has no experts; leave it out"
    if field in _TRAINING_ONLY and not role.trains:
        return "a teacher is not trained, so it has no effect; leave it out"
    if field in _CHOICES and value not in _CHOICES[field][0]:
        choices, reason = _CHOICES[field]
        return f"{value!r}, but {reason}; use {' or '.join(choices)}"
    if field in _COEFFICIENTS and (type(value) not in (int, float) or not 0 <= value < math.inf):
        return f"{value!r} is not allowed; give one number of at least 0"
    if field in ENGINE_ONLY and value and role.no_engine:
        return f"{value!r} needs Transformer Engine's kernels and {role.no_engine}; leave it out"
    low = _low_precision(role)
    if field == "recompute_modules" and low and isinstance(value, list) and "moe" in value:
        return (
            f"'moe' with {low} reads process groups that only megatron-core's own set-up makes; leave 'moe' out, or "
            "take recompute_granularity: full"
        )
    return None


def _low_precision(role: Role) -> str | None:
    """The setting that has Transformer Engine compute in less than 16 bits."""
    fp8 = role.config.precision.fp8
    if fp8 is not None and not fp8.emulate:
        return role.at("precision.fp8")
    return role.at("megatron.fp4") if role.config.megatron.get("fp4") else None
