"""From shape and recipe to megatron-core's configuration: vocabulary, stages, rotary frequencies, overrides."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from fire_megatron.config.errors import RecipeError
from fire_megatron.config.hf_config import read_hf_config
from fire_megatron.config.schema import ParallelConfig, PrecisionConfig, StudentConfig
from fire_megatron.models import build
from fire_megatron.models.build import (
    build_model,
    check_megatron_fields,
    padded_vocab_size,
    pipeline_stages,
    resolve_layer_spec,
    transformer_config,
)
from fire_megatron.models.rotary_angles import rotary_frequencies
from fire_megatron.parallel.grid import Layout
from fire_megatron.platform.capabilities import Capability
from fire_megatron.platform.device import Device

CPU = Device("cpu")
CUDA = Device("cuda")


@pytest.mark.parametrize(
    ("vocabulary", "multiple", "tensor", "padded"),
    [(301, 128, 1, 384), (301, 128, 4, 512), (384, 128, 1, 384), (384, 128, 3, 384), (1, 1, 1, 1), (301, 4, 2, 304)],
)
def test_padded_vocab_size(vocabulary, multiple, tensor, padded):
    assert padded_vocab_size(vocabulary, multiple=multiple, tensor=tensor) == padded


@pytest.mark.parametrize(("multiple", "tensor"), [(128, 1), (128, 8), (7, 3)])
def test_padded_vocab_size_is_the_smallest_that_divides(multiple, tensor):
    unit = multiple * tensor
    for vocabulary in range(1, 3 * unit, 5):
        padded = padded_vocab_size(vocabulary, multiple=multiple, tensor=tensor)
        assert padded % unit == 0 and padded - unit < vocabulary <= padded


def stages_of_megatron(layers, pipeline):
    """What megatron-core gives each stage with the settings that we pass it."""
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
        **build._pipeline_settings(layers, pipeline),
    )
    return [get_num_layers_to_build(config, vp_stage=None, pp_rank=rank) for rank in range(pipeline)]


@pytest.mark.parametrize("pipeline", [1, 2, 3, 4, 5, 8, 16])
def test_pipeline_stages(pipeline):
    for layers in range(pipeline, 81):
        stages = pipeline_stages(layers, pipeline)
        assert len(stages) == pipeline and sum(stages) == layers and min(stages) >= 1, layers
        assert len(set(stages[1:-1])) <= 1, "megatron-core can size the first and the last stage only"
        if layers % pipeline == 0:
            assert len(set(stages)) == 1
        if layers <= 17 or layers > 76:
            assert stages_of_megatron(layers, pipeline) == stages


@pytest.mark.parametrize(
    ("layers", "pipeline", "stages"),
    [(3, 2, [2, 1]), (5, 3, [2, 2, 1]), (22, 4, [5, 6, 6, 5]), (30, 4, [7, 8, 8, 7]), (5, 4, [2, 1, 1, 1])],
)
def test_stages_that_do_not_divide(layers, pipeline, stages):
    assert pipeline_stages(layers, pipeline) == stages


ROPES = {
    "default": None,
    "another base": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3.2": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize("name", ROPES)
def test_rotary_frequencies_are_those_of_transformers(name, head_dim, save_config, tmp_path):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    changes = {} if ROPES[name] is None else {"rope_parameters": ROPES[name]}
    config = save_config("llama", head_dim=head_dim, **changes)
    ours, theirs = rotary_frequencies(read_hf_config(tmp_path)), LlamaRotaryEmbedding(config).inv_freq
    assert ours.dtype == torch.float32 and ours.shape == (head_dim // 2,)
    torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=0)  # two units in the last place
    if name.startswith("llama3") and head_dim == 128:
        plain = rotary_frequencies(dataclasses.replace(read_hf_config(tmp_path), rope_scaling=None))
        ratios = plain / ours
        middle = (ratios > 1.01) & (ratios < ROPES[name]["factor"] * 0.99)
        assert (
            middle.any() and ratios.min() == pytest.approx(1) and ratios.max() == pytest.approx(ROPES[name]["factor"])
        ), "all three bands occur"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"recompute_granularty": "full"}, "no such field; did you mean 'recompute_granularity'?"),
        ({"xyzzy": 1}, "xyzzy: megatron-core's TransformerConfig has no such field"),
        ({"init_method_std": "0.1"}, "'0.1' does not fit megatron-core's type of it, float"),
        ({"init_method_std": True}, "True does not fit"),
        ({"recompute_num_layers": 1.5}, "1.5 does not fit"),
        ({"recompute_num_layers": True}, "True does not fit"),
        ({"recompute_modules": "core_attn"}, "'core_attn' does not fit"),
        ({"recompute_modules": [1]}, "[1] does not fit"),
        ({"deterministic_mode": 1}, "1 does not fit megatron-core's type of it, bool"),
        ({"init_method": "normal"}, "'normal' does not fit"),
        ({"init_method_std": None}, "None does not fit"),
    ],
)
def test_overrides_that_are_refused(overrides, says):
    with pytest.raises(RecipeError) as error:
        check_megatron_fields("student", overrides)
    assert str(error.value).startswith(f"student.megatron.{next(iter(overrides))}: ") and says in str(error.value)


def test_an_unknown_key_without_a_likeness_gets_no_suggestion():
    with pytest.raises(RecipeError) as error:
        check_megatron_fields("teachers.math", {"xyzzy": 1})
    assert "did you mean" not in str(error.value) and str(error.value).startswith("teachers.math.megatron.xyzzy")


FITTING = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
    "recompute_modules": ["core_attn"],
    "deterministic_mode": True,
    "layernorm_zero_centered_gamma": False,
    "init_method_std": 1,
}


def test_overrides_that_fit():
    check_megatron_fields("student", FITTING)
    check_megatron_fields("student", {"recompute_granularity": None})
    check_megatron_fields("student", {})


@pytest.mark.parametrize(
    ("version", "detail", "missing"),
    [("2.9", "layer spec 'te'", None), (None, "not installed; layer spec 'local'", "not installed")],
)
def test_layer_spec_with_and_without_transformer_engine(version, detail, missing, monkeypatch):
    found = Capability("transformer-engine", version, detail)
    monkeypatch.setattr(build, "detect_capabilities", lambda device: (found,))
    auto = "te" if version else "local"
    assert [resolve_layer_spec(setting, CUDA) for setting in ("auto", "local")] == [auto, "local"]
    assert build.this_machine(CUDA).no_engine == missing


def test_layer_spec_on_a_cpu():
    """Detected in earnest: without a GPU it is never used, installed or not."""
    assert resolve_layer_spec("auto", CPU) == "local" and build.this_machine(CPU).no_engine


def student(**changes):
    """A role without a checkpoint."""
    return StudentConfig(checkpoint="absent", **changes)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral-window"])
def test_transformer_config(family, save_config, grid, tmp_path):
    save_config(family)
    shape = read_hf_config(tmp_path)
    role = student(precision=PrecisionConfig(dtype="bfloat16"), megatron={"recompute_granularity": "selective"})
    config = transformer_config(shape, role, Layout(), device=CPU)
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (4, 64, 96)
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (4, 2, shape.head_dim)
    assert (config.add_qkv_bias, config.qk_layernorm) == (family == "qwen2", family == "qwen3")
    # megatron-core counts the positions before the token itself.
    assert config.window_size == ((6, 0) if family == "mistral-window" else None)
    assert (config.params_dtype, config.pipeline_dtype, config.bf16) == (torch.bfloat16, torch.bfloat16, True)
    assert config.layernorm_epsilon == 1e-5 and config.hidden_dropout == config.attention_dropout == 0
    assert config.recompute_granularity == "selective" and not config.sequence_parallel


@pytest.mark.parametrize(("device", "dtype"), [(CPU, torch.float32), (CUDA, torch.bfloat16)])
def test_format_of_a_device(device, dtype, save_config, tmp_path):
    save_config("llama")
    config = transformer_config(read_hf_config(tmp_path), student(layer_spec="local"), Layout(), device=device)
    assert (config.params_dtype, config.pipeline_dtype, config.bf16) == (dtype, dtype, dtype is torch.bfloat16)


@pytest.mark.parametrize("normalised", [True, False])
def test_transformer_config_of_experts(normalised, save_config, tmp_path):
    save_config("qwen3-moe", norm_topk_prob=normalised)
    role = student(megatron={"moe_aux_loss_coeff": 0.01})
    config = transformer_config(read_hf_config(tmp_path), role, Layout(expert=2, num_ranks=2), device=CPU)
    assert (config.num_moe_experts, config.moe_router_topk, config.moe_ffn_hidden_size) == (4, 2, 40)
    assert config.moe_router_pre_softmax != normalised and config.moe_router_score_function == "softmax"
    assert config.moe_router_dtype == "fp32" and not config.moe_grouped_gemm and config.moe_aux_loss_coeff == 0.01
    assert config.moe_expert_capacity_factor is None and config.expert_model_parallel_size == 2


@pytest.mark.parametrize(
    ("tensor", "asked", "used"), [(1, None, False), (2, None, True), (2, False, False), (2, True, True)]
)
def test_sequence_parallelism(tensor, asked, used, save_config, tmp_path):
    save_config("llama")
    role = student(parallel=ParallelConfig(tensor=tensor, sequence=asked))
    layout = Layout(tensor=tensor, num_ranks=tensor)
    assert transformer_config(read_hf_config(tmp_path), role, layout, device=CPU).sequence_parallel == used


def test_how_context_ranks_share_keys_and_values(save_config, tmp_path):
    save_config("mistral-window")
    shape, layout = read_hf_config(tmp_path), Layout(context=2, num_ranks=2)
    config = transformer_config(shape, student(megatron={"cp_comm_type": "all_gather"}), layout, device=CPU)
    assert (config.context_parallel_size, config.cp_comm_type) == (2, "all_gather")


def test_a_combination_that_megatron_rejects(save_config, tmp_path):
    save_config("llama")
    role = student(megatron={"recompute_granularity": "full"})
    with pytest.raises(RecipeError, match="megatron-core rejects this model configuration: .*recompute_method"):
        transformer_config(read_hf_config(tmp_path), role, Layout(), device=CPU)


@pytest.mark.parametrize("tied", [False, True])
def test_build_model(tied, save_config, grid, tmp_path):
    save_config("qwen2", tie_word_embeddings=tied)
    shape = read_hf_config(tmp_path)
    model = build_model(shape, student(vocab_multiple=128), grid, device=CPU)
    parameters = dict(model.named_parameters())
    assert parameters["embedding.word_embeddings.weight"].shape == (384, 64)
    assert ("output_layer.weight" in parameters) == (not tied)
    assert sum("self_attention.linear_qkv.bias" in name for name in parameters) == 4
    assert not any(name.endswith(("linear_proj.bias", "linear_fc1.bias")) for name in parameters)
    assert (model.vocab_start, model.real_vocab_size) == (0, 301)
    torch.testing.assert_close(model.rotary_pos_emb.inv_freq, rotary_frequencies(shape), rtol=0, atol=0)
