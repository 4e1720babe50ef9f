"""The table of megatron-core's TransformerConfig: what each field of it means under a role's ``megatron``.

It covers megatron-core 0.16 to 0.19, whose fields are named here so that nothing imports torch; a test compares the
table with the installed release. rules/megatron.py refuses what the table says may not be set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["works", "checkpoint", "set", "idle", "unsupported", "untested"]
CHECKPOINT = "checkpoint (the model's own config.json)"


@dataclass(frozen=True)
class Field:
    """What a field means here."""

    kind: Kind
    """``works``: tested here; ``checkpoint``: part of the model; ``set``: another key of the role decides it; ``idle``:
    without effect; ``unsupported``; ``untested``: nobody has tried it here."""
    text: str
    """What it does where it works, the key that decides it, or why it may not be set."""
    values: tuple[Any, ...] | None = None
    """Those that may be set where it works; None for any that megatron-core takes."""


def _same(kind: Kind, groups: Mapping[str, str]) -> Iterator[tuple[str, Field]]:
    """Fields of one kind, by what there is to say of them."""
    for text, names in groups.items():
        yield from ((name, Field(kind, text)) for name in names.split())


_WORKS = {
    "recompute_granularity": Field(
        "works",
        "activations of a training pass that are computed again in the backward pass: all of some layers (`full`, with "
        "`recompute_method` and `recompute_num_layers`), or parts of each (`selective`, with `recompute_modules`)",
        (None, "full", "selective"),
    ),
    "recompute_method": Field(
        "works",
        "which layers `full` recomputes: all, `recompute_num_layers` at a time (`uniform`), or so many at the start of "
        "each pipeline stage one by one (`block`)",
        (None, "uniform", "block"),
    ),
    "recompute_num_layers": Field(
        "works", "layers; with `uniform` a number that divides the layers of every pipeline stage"
    ),
    "recompute_modules": Field(
        "works",
        "parts that `selective` recomputes: `core_attn` (the default), `mlp` (dense layers), `moe` (layers of experts; "
        "not in FP8); `layernorm` and `moe_act` with Transformer Engine and `megatron_untested`",
    ),
    "deallocate_pipeline_outputs": Field("works", "frees what a pipeline stage has sent on, with `parallel.pipeline`"),
    "moe_aux_loss_coeff": Field("works", "coefficient of the routers' load-balancing loss, of a student with experts"),
    "moe_z_loss_coeff": Field("works", "coefficient of the routers' z-loss, of a student with experts"),
    "moe_router_load_balancing_type": Field("works", "which load-balancing loss", ("aux_loss",)),
    "moe_router_dtype": Field("works", "format of the routers' products", ("fp32", "fp64")),
    "moe_token_dispatcher_type": Field("works", "how tokens reach their experts", ("alltoall",)),
}

_CHECKPOINT = """
    num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size normalization
    layernorm_epsilon layernorm_zero_centered_gamma gated_linear_unit activation_func activation_func_clamp_value
    glu_linear_offset add_bias_linear add_qkv_bias qk_layernorm qk_l2_norm attention_output_gate window_size
    window_attn_skip_freq no_rope_freq rotary_interleaved mrope_section softmax_scale
    apply_residual_connection_post_layernorm multi_latent_attention experimental_attention_variant
    linear_attention_freq linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads
    linear_num_value_heads dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_topk_freq
    dsa_indexer_skip_topk_offset dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss dsa_kernel_backend
    dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon
    dsa_indexer_k_norm_fp32 heterogeneous_block_specs is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups
    mamba_num_heads use_mup mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult mup_base_head_dim
    mup_attn_scale_power num_moe_experts moe_ffn_hidden_size moe_router_topk moe_router_pre_softmax moe_layer_freq
    moe_router_score_function moe_router_num_groups moe_router_group_topk moe_router_topk_limited_devices
    moe_router_topk_scaling_factor moe_router_enable_expert_bias moe_shared_expert_intermediate_size
    moe_shared_expert_gate moe_latent_size moe_apply_probs_on_input
"""

_SET = {
    "parallel.tensor": "tensor_model_parallel_size expert_tensor_parallel_size",
    "parallel.pipeline": """
        pipeline_model_parallel_size num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
        pipeline_model_parallel_layout account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
    """,
    "parallel.context": """
        context_parallel_size hierarchical_context_parallel_sizes hybrid_context_parallel max_seqlen_per_dp_cp_rank
    """,
    "parallel.expert": "expert_model_parallel_size",
    "parallel.sequence": "sequence_parallel",
    "precision.dtype": "params_dtype pipeline_dtype bf16 fp16 enable_autocast autocast_dtype",
    "precision.fp8": """
        fp8 fp8_recipe fp8_param fp8_margin fp8_amax_history_len fp8_amax_compute_algo fp8_quantizer_factory
        first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16
    """,
    "layer_spec": "transformer_impl use_kitchen use_kitchen_attention kitchen_attention_backend",
    "megatron.recompute_modules": "moe_layer_recompute",
}

_IDLE = {
    "every weight comes from the checkpoint": """
        init_method output_layer_init_method init_method_std embedding_init_method embedding_init_method_std
        use_cpu_initialization init_model_with_meta_device
    """,
    "the core attention is scaled_dot_product_attention and does not read it": """
        apply_query_key_layer_scaling attention_softmax_in_fp32 softmax_type attention_backend flash_attention_version
        masked_softmax_fusion test_mode
    """,
    "the loss is computed outside the model (loss.chunk_tokens)": "cross_entropy_loss_fusion cross_entropy_fusion_impl",
    "dense layers' gated activation is one operation already, and experts' is fused on a GPU": "bias_activation_fusion",
    "without bias and dropout there is nothing to fuse": "bias_dropout_fusion",
    "norms are RMSNorm": "persist_layer_norm memory_efficient_layer_norm",
    "the activation is the checkpoint's": "use_fused_weighted_squared_relu",
    "the student adds weight gradients within the product wherever its layers can": "gradient_accumulation_fusion",
    "nothing in a model is random": "use_te_rng_tracker inference_rng_tracker",
    "sampling is seeded by run.seed": "inference_sampling_seed",
    "answers are sampled by an engine of our own (rollout)": """
        flash_decode mlp_chunks_for_prefill nccl_all_reduce_for_prefill use_inference_optimized_layers
        inference_fuse_tp_communication inference_disable_triton_nvls_kernels inference_grouped_gemm_backend
        inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type
        moe_pad_experts_for_cuda_graph_inference
    """,
    "rollout.cuda_graphs says whether decode steps are CUDA graphs": "inference_cuda_graph_scope",
    "metrics time the phases of a step": "timers barrier_with_L1_time",
    "process groups are made by the run": "pipeline_model_parallel_comm_backend",
    "checkpoints have a format of our own": "hetereogenous_dist_checkpoint",
    "nothing here reads it": """
        async_tensor_model_parallel_allreduce fp8_interval cuda_graph_use_single_mempool moe_per_layer_logging
        moe_router_bias_update_rate moe_router_quantile_balancing_ema moe_shared_expert_glu_interleave_size
        use_grouped_gemm_for_shared_expert mamba_training_ssm_states_dtype use_mamba_mem_eff_path
        overlap_p2p_comm_warmup_flush
    """,
}

_UNSUPPORTED = {
    "the trainer relies on its own value": """
        variable_seq_lengths calculate_per_token_loss perform_initialization batch_p2p_comm batch_p2p_sync
        overlap_p2p_comm use_ring_exchange_p2p
    """,
    "its kernel takes positions from the start of each pack, and rows have positions of their own": """
        apply_rope_fusion fused_single_qkv_rope
    """,
    "the loss projects to the vocabulary itself": "fp8_output_proj defer_embedding_wgrad_compute wgrad_deferral_limit",
    "log-probabilities are compared between passes, so there is no dropout": "hidden_dropout attention_dropout",
    "messages between pipeline stages are in precision.dtype": "fp32_residual_connection",
    "the gated activation keeps its input as it is": "activation_func_fp8_input_store",
    "heads that predict further tokens are neither loaded nor trained": """
        mtp_num_layers mtp_loss_scaling_factor mtp_use_repeated_layer mtp_detach_heads mtp_hybrid_override_pattern
        mtp_standalone
    """,
    "a pipeline stage is one piece of consecutive layers": """
        virtual_pipeline_model_parallel_size microbatch_group_size_per_vp_stage
    """,
    "it reads process groups that only megatron-core's own set-up makes": """
        distribute_saved_activations config_logger_dir
    """,
    "the pipeline's forward pass takes no such argument; recompute_granularity saves activations": """
        num_microbatches_with_partial_activation_checkpoints
    """,
    "it is prepared in a forward pass of megatron-core's own; recompute_granularity saves activations": """
        fine_grained_activation_offloading offload_modules min_offloaded_tensor_size delay_offload_until_cuda_graph
        delta_offload_bytes_across_pp_ranks activation_offload_fraction fine_grained_offloading_max_inflight_offloads
        moe_paged_stash moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda
        moe_paged_stash_buffer_size_factor_cpu
    """,
    "micro-batches differ in length, so a training pass is no CUDA graph": """
        enable_cuda_graph external_cuda_graph cuda_graph_impl cuda_graph_scope cuda_graph_modules
        cuda_graph_retain_backward_graph cuda_graph_warmup_steps
    """,
    "attention scores are never whole, and the optimizer is AdamW": """
        qk_clip qk_clip_alpha qk_clip_threshold log_max_attention_logit
    """,
    "YAML cannot hold a function or an object": """
        finalize_model_grads_func grad_scale_func moe_grad_scale_func mtp_grad_scale_func no_sync_func grad_sync_func
        param_sync_func experimental_attention_variant_loss_scale_func _cpu_offloading_context quant_recipe
    """,
    "a token's log-probability would depend on the tokens beside it, or on chance": """
        moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy moe_token_dropping
        moe_expert_rank_capacity_factor moe_input_jitter_eps
    """,
    "teachers and student are compared on the routing that the checkpoint learned": """
        moe_router_force_load_balancing moe_router_force_biased moe_enable_routing_replay
    """,
    "checkpoints hold the weights in another arrangement": """
        moe_mlp_glu_interleave_size moe_single_grouped_weight moe_single_grouped_bias moe_extended_tp
        use_grouped_gemm_for_dense_mlp
    """,
    "parallel.tensor and parallel.expert say how weights are spread": """
        tensor_parallel_num_weight_shards gtp_weight_remat_size expert_gtp_weight_remat_size
        expert_tensor_parallel_num_weight_shards
    """,
    "no family here has shared experts": "moe_shared_expert_overlap",
    "grouped experts are Transformer Engine's": "moe_use_legacy_grouped_gemm",
    "its schedule runs a forward pass of its own, without packed rows": """
        overlap_moe_expert_parallel_comm delay_wgrad_compute overlap_dispatch_backward_with_experts_wgrad
        ep_overlap_early_attn_memory_release high_priority_a2a_comm_stream
    """,
}

_UNTESTED = {
    "Transformer Engine's layers and kernels": """
        cp_comm_type moe_grouped_gemm moe_permute_fusion moe_router_fusion use_te_activation_func
        use_transformer_engine_op_fuser fused_residual_rmsnorm disable_parameter_transpose_cache symmetric_ar_type
        deterministic_mode batch_invariant_mode
    """,
    "formats of less than 16 bits": """
        tp_only_amax_red fp8_wgrad fp8_dot_product_attention fp8_multi_head_attention fp4 fp4_recipe fp4_param
        fp4_quantizer_factory
        moe_router_padding_for_quantization moe_router_padding_for_fp8
    """,
    "communication of tensor-parallel layers behind their products": """
        tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs
        tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs
        tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend
    """,
    "other ways for tokens to reach their experts": """
        moe_enable_deepep moe_flex_dispatcher_backend moe_permute_fusion_into_hybridep
        moe_hybridep_pad_uneven_dispatch_inputs moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms
        moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing
        moe_ncclep_static_shape moe_ncclep_zero_copy
    """,
    "activations on the host": """
        cpu_offloading cpu_offloading_num_layers cpu_offloading_activations cpu_offloading_weights
        cpu_offloading_double_buffering cpu_offloading_retain_pinned_cpu_buffers
    """,
    "others": """
        disable_bf16_reduced_precision_matmul mlp_chunks_for_training clone_scatter_output_in_embedding
    """,
}

FIELDS: Mapping[str, Field] = dict(
    [
        *_WORKS.items(),
        *_same("checkpoint", {CHECKPOINT: _CHECKPOINT}),
        *_same("set", _SET),
        *_same("idle", _IDLE),
        *_same("unsupported", _UNSUPPORTED),
        *_same("untested", _UNTESTED),
    ]
)
"""Every field of megatron-core 0.16 to 0.19."""
TRAINING_ONLY = (
    "recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules",
    "deallocate_pipeline_outputs", "moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_load_balancing_type",
)  # fmt: skip
"""Fields that change gradients, or what is kept for them, so that they mean nothing to a teacher."""
ENGINE_ONLY = ("moe_grouped_gemm", "moe_permute_fusion", "moe_router_fusion", "fp4")
"""Fields that turn on Transformer Engine's kernels."""
ENGINE_MODULES = ("layernorm", "moe_act")
"""Entries of ``recompute_modules`` whose recomputation is Transformer Engine's, untested here."""
