"""config.json of every family in both of transformers' forms, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from models import FAMILIES

from fire_megatron.config.errors import CheckpointError
from fire_megatron.config.hf_config import ExpertShape, ModelShape, read_hf_config

SHAPE = ModelShape(
    family="llama",
    num_layers=4,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=96,
    vocab_size=301,
    max_positions=512,
    rope_theta=10000.0,
    norm_eps=1e-5,
    tied=False,
)
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
DEPARTURES = {
    "llama": {},
    "llama3-tied": {"tied": True, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "qwen2": {"family": "qwen2", "tied": True, "qkv_bias": True},
    "qwen3": {"family": "qwen3", "head_dim": 24, "qk_norm": True},
    "qwen3-moe": {"family": "qwen3_moe", "head_dim": 24, "qk_norm": True, "experts": ExpertShape(4, 2, 40, True)},
    "qwen3-moe-mixed": {
        "family": "qwen3_moe",
        "tied": True,
        "qk_norm": True,
        "experts": ExpertShape(6, 2, 40, False, dense_layers=(1,)),
    },
    "mistral": {"family": "mistral"},
    "mistral-window": {"family": "mistral", "sliding_window": 7},
    "qwen2-windows": {
        "family": "qwen2",
        "qkv_bias": True,
        "sliding_window": 7,
        "full_layers": (0,),
        "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "attention_factor": 0.1 * math.log(4) + 1,
            "beta_fast": 32,
            "beta_slow": 1,
            "truncate": True,
        },
    },
    "phi3": {
        "family": "phi3",
        "partial_rotary": 12,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.05, 1.1, 1.2, 1.4, 1.5],
            "long_factor": [1.0, 1.3, 2.0, 4.0, 9.0, 20.0],
            "original_max_position_embeddings": 16,
            "attention_factor": 1.5,  # sqrt(1 + log(512 / 16) / log(16))
        },
    },
    "llama-dynamic": {
        "max_positions": 48,
        "rope_theta": 100.0,
        "rope_scaling": {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 16},
    },
}
"""How each family's shape differs from :data:`SHAPE`."""


@pytest.mark.parametrize("family", FAMILIES)
def test_as_transformers_writes_it(family, save_config, tmp_path):
    save_config(family)
    assert read_hf_config(tmp_path) == dataclasses.replace(SHAPE, **DEPARTURES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_as_transformers_4_wrote_it(family, save_config, tmp_path):
    """The base at the top and ``rope_scaling`` beside it."""
    save_config(family)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    rope = values.pop("rope_parameters", None)
    if rope:  # or else it has been 4 that wrote it
        values["rope_theta"] = rope.pop("rope_theta")
        values["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    path.write_text(json.dumps(values))
    assert read_hf_config(tmp_path) == dataclasses.replace(SHAPE, **DEPARTURES[family])


def test_the_oldest_form_of_rope_scaling(write_config):
    shape = read_hf_config(write_config(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4}))
    assert (shape.rope_theta, shape.rope_scaling) == (5e5, {"rope_type": "linear", "factor": 4.0})


def test_the_old_form_comes_before_the_new(write_config):
    """Whole: nothing of the new form is left. test_config_logits.py has what transformers makes of it."""
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}
    shape = read_hf_config(write_config(rope_parameters=new, rope_scaling={"type": "linear", "factor": 9.0}))
    assert (shape.rope_theta, shape.rope_scaling) == (1e4, {"rope_type": "linear", "factor": 9.0})


@pytest.mark.parametrize(
    ("rope", "reach"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 2048),
        ({"rope_type": "dynamic", "factor": 1.5}, 768),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 300}, 1200),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}, 512),
        ({"rope_type": "llama3", **LLAMA3}, 512),
    ],
)
def test_scaling_reaches_as_far_as_its_factor_says(rope, reach, write_config):
    assert read_hf_config(write_config(rope_scaling=rope)).max_positions == reach


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "phi3"])
def test_keys_left_out_mean_what_they_mean_to_transformers(family, write_config):
    """Sizes that no published config leaves out are not among them."""
    import transformers

    optional = ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "head_dim", "rope_theta")
    heads = {"num_attention_heads": 32, "hidden_size": 1024}
    if family == "qwen3_moe":
        heads["num_experts"] = 8
    folder = write_config(model_type=family, max_position_embeddings=32768, **heads, **dict.fromkeys(optional))
    shape, config = read_hf_config(folder), transformers.AutoConfig.from_pretrained(folder)
    assert shape.kv_heads == config.num_key_value_heads
    assert shape.norm_eps == config.rms_norm_eps
    assert shape.tied == config.tie_word_embeddings
    assert shape.head_dim == (getattr(config, "head_dim", None) or 1024 // 32)
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    assert shape.rope_theta == rope["rope_theta"]
    if shape.experts:
        experts = (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size, config.norm_topk_prob)
        assert shape.experts == ExpertShape(*experts)
    assert shape.sliding_window == (config.sliding_window if family == "mistral" else None)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "phi3", "sliding_window": 100}, 100),
        ({"model_type": "phi3"}, None),
        ({"model_type": "mistral", "sliding_window": 100}, 100),
        ({"model_type": "mistral", "sliding_window": 511}, 511),
        ({"model_type": "mistral", "sliding_window": 512}, None),  # reaches every position
        ({"model_type": "mistral", "sliding_window": None}, None),  # left out: 4096, beyond the 512 positions
        ({"model_type": "llama", "sliding_window": 100}, None),  # not a setting of Llama's
        ({"model_type": "qwen2", "sliding_window": 100, "use_sliding_window": False}, None),
        ({"model_type": "qwen2", "sliding_window": 600, "use_sliding_window": True, "max_window_layers": 0}, None),
        ({"model_type": "qwen2", "sliding_window": 100, "use_sliding_window": True, "max_window_layers": 4}, None),
        ({"model_type": "qwen3", "layer_types": ["full_attention"] * 4}, None),
    ],
)
def test_sliding_window(changes, window, write_config):
    assert read_hf_config(write_config(**changes)).sliding_window == window


@pytest.mark.parametrize(
    ("changes", "full"),
    [
        ({"max_window_layers": 0}, ()),
        ({"max_window_layers": 3}, (0, 1, 2)),
        ({"max_window_layers": 4}, None),
        ({}, None),  # left out: 28
        ({"max_window_layers": 0, "layer_types": ["full_attention"] * 4}, None),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, (0, 2)),
    ],
)
def test_layers_without_the_window(changes, full, write_config):
    folder = write_config(model_type="qwen2", sliding_window=100, use_sliding_window=True, **changes)
    shape = read_hf_config(folder)
    assert (shape.sliding_window, shape.full_layers) == ((None, ()) if full is None else (100, full))


LONGROPE = {"rope_type": "longrope", "factor": 4.0}
REFUSED = [
    ({"model_type": "gpt2"}, "model_type is 'gpt2'; supported: llama, mistral, phi3, qwen2, qwen3"),
    ({"model_type": None}, "model_type is None; supported: llama"),
    ({"model_type": ["llama"]}, "model_type is ['llama']; supported: llama"),
    ({"hidden_size": None}, "hidden_size is missing; the file is incomplete"),
    ({"vocab_size": None}, "vocab_size is missing"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a whole number of at least 1"),
    ({"num_hidden_layers": "4"}, "num_hidden_layers is '4'"),
    ({"intermediate_size": 96.5}, "intermediate_size is 96.5"),
    ({"intermediate_size": True}, "intermediate_size is True"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
    ({"hidden_size": 66}, "hidden_size 66 is not a multiple of num_attention_heads 4 and head_dim is unset"),
    ({"head_dim": 15}, "head_dim is 15; rotary positions need an even number"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0; it must be a number above 0"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
    ({"attention_bias": True}, "attention_bias is True; only False is supported"),
    ({"mlp_bias": True}, "mlp_bias is True; only False is supported"),
    ({"per_layer_config": {"0": {"sliding_window": 7}}}, "per_layer_config is {'0': {'sliding_window': 7}}; only None"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is set; give the unquantized"),
    ({"rope_theta": -1.0}, "rope_theta is -1.0; it must be a number above 0"),
    ({"rope_scaling": {"type": "mrope"}}, "rope_scaling.rope_type is 'mrope'; supported: default, linear, dynamic, "),
    ({"rope_parameters": {"rope_type": "proportional"}}, "rope_parameters.rope_type is 'proportional'; supported"),
    ({"rope_scaling": {"type": "yarn", "rope_type": "default"}}, "rope_type is 'default' and rope_scaling.type is"),
    ({"rope_scaling": LONGROPE}, "rope_scaling.short_factor is missing"),
    ({"rope_scaling": LONGROPE | {"short_factor": [1.0]}}, "short_factor is [1.0]; it must be a list of 8 numbers"),
    ({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'; supported:"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1.5}}, "rope_scaling.truncate is 1.5; it must be tr"),
    ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_scaling.rope_type is ['linear']; supported"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor is 0; it must be a number above 0"),
    (
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
        "rope_scaling.high_freq_factor must exceed low_freq_factor",
    ),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor is missing"),
    ({"rope_scaling": 4.0}, "rope_scaling is 4.0; it must be one mapping"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters is {'full_attention'"),
    ({"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which transformers' model of this family does not"),
    ({"model_type": "phi3", "partial_rotary_factor": 0.05}, "partial_rotary_factor is 0.05, which leaves 0 of a head"),
    ({"model_type": "phi3", "partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5, which leaves 24 of a head"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
    ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": -1}, "max_window_layers is -1; it"),
    ({"model_type": "qwen3", "layer_types": 4}, "layer_types is 4; it must be a list of 4, one for each layer"),
    ({"model_type": "qwen3", "layer_types": ["full_attention"] * 3}, "it must be a list of 4, one for each layer"),
    (
        {"model_type": "qwen3", "layer_types": ["full_attention", "chunked_attention"] * 2},
        "layer_types contains chunked_attention; only full_attention and sliding_attention are supported",
    ),
    (
        {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 4, "sliding_window": 7},
        "layer_types contains sliding_attention, but {'use_sliding_window': None, 'sliding_window': 7} make no window",
    ),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[f"{i}-{next(iter(c))}" for i, (c, _) in enumerate(REFUSED)])
def test_refused(changes, says, write_config):
    folder = write_config(**changes)
    with pytest.raises(CheckpointError) as error:
        read_hf_config(folder)
    assert str(error.value).startswith(f"{folder / 'config.json'}: ") and says in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "cannot be read as JSON"), (b"{", "cannot be read as JSON"), (b"\xff", "JSON"), (b"[]", "a JSON object")],
)
def test_not_a_config(content, says, tmp_path):
    with pytest.raises(CheckpointError, match="config.json is missing; give the folder of a model"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as error:
        read_hf_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_no_such_folder(tmp_path):
    with pytest.raises(CheckpointError, match="absent does not exist; correct the path"):
        read_hf_config(tmp_path / "absent")


def test_experts_as_they_are_published(save_config, tmp_path):
    """Qwen3-30B-A3B's config.json counts them under another name than newer transformers writes."""
    save_config("qwen3-moe")
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["num_experts"] = values.pop("num_local_experts", values.get("num_experts"))
    del values["norm_topk_prob"], values["mlp_only_layers"]
    path.write_text(json.dumps(values))
    assert read_hf_config(tmp_path).experts == ExpertShape(4, 2, 40, False)


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({}, ()),
        ({"mlp_only_layers": None}, ()),
        ({"decoder_sparse_step": 2}, (0, 2)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (0, 2, 3)),
    ],
)
def test_dense_layers_are_those_of_transformers(changes, dense, save_config, tmp_path):
    import transformers

    config = save_config("qwen3-moe", **changes)
    assert read_hf_config(tmp_path).experts.dense_layers == dense
    with torch.device("meta"):
        layers = transformers.Qwen3MoeForCausalLM(config).model.layers
    assert [i for i, layer in enumerate(layers) if not hasattr(layer.mlp, "experts")] == list(dense)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"decoder_sparse_step": 5}, "leave no layer with experts"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, "leave no layer with experts"),
        ({"mlp_only_layers": [4]}, r"mlp_only_layers is \[4\]; it must be a list of layers, 0 to 3"),
        ({"mlp_only_layers": 1}, "mlp_only_layers is 1; it must be a list"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, but num_local_experts is 4; it cannot exceed it"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob is true with num_experts_per_tok 1"),
        ({"num_local_experts": None}, "num_local_experts is missing; the file is incomplete"),
    ],
)
def test_experts_that_are_refused(changes, says, save_config, tmp_path):
    save_config("qwen3-moe")
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["num_local_experts"] = values.pop("num_experts", values.get("num_local_experts"))
    path.write_text(json.dumps(values | changes))
    with pytest.raises(CheckpointError, match=says):
        read_hf_config(tmp_path)
