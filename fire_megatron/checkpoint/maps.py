"""Which Hugging Face tensors make up which megatron-core tensor, one table a family.

A rule names a megatron-core tensor (as ``GPTModel.sharded_state_dict`` calls it, with the layer's global number), the
Hugging Face tensors it is made of with their shapes in words, and how they are put together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fire_megatron.models.hf_config import ModelShape

PLAIN, STACK, GROUPED = "plain", "stack", "grouped"
"""One tensor as it is; tensors under one another; q, k and v interleaved by key/value group."""


@dataclass(frozen=True)
class Rule:
    """One megatron-core tensor. ``{i}`` in names stands for every layer."""

    key: str
    sources: Mapping[str, str]
    """Hugging Face name -> shape in words; see :func:`_dimensions`."""
    layout: str = PLAIN


_LAYER, _HF = "decoder.layers.{i}.", "model.layers.{i}."
_EMBEDDING = Rule("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "vocab hidden"})
_OUTPUT = Rule("output_layer.weight", {"lm_head.weight": "vocab hidden"})
_DECODER = (
    Rule(
        _LAYER + "self_attention.linear_qkv.layer_norm_weight",
        {_HF + "input_layernorm.weight": "hidden"},
    ),
    Rule(
        _LAYER + "self_attention.linear_qkv.weight",
        {
            _HF + "self_attn.q_proj.weight": "q hidden",
            _HF + "self_attn.k_proj.weight": "kv hidden",
            _HF + "self_attn.v_proj.weight": "kv hidden",
        },
        GROUPED,
    ),
    Rule(_LAYER + "self_attention.linear_proj.weight", {_HF + "self_attn.o_proj.weight": "hidden q"}),
    Rule(
        _LAYER + "mlp.linear_fc1.layer_norm_weight",
        {_HF + "post_attention_layernorm.weight": "hidden"},
    ),
    Rule(
        _LAYER + "mlp.linear_fc1.weight",
        {_HF + "mlp.gate_proj.weight": "ffn hidden", _HF + "mlp.up_proj.weight": "ffn hidden"},
        STACK,
    ),
    Rule(_LAYER + "mlp.linear_fc2.weight", {_HF + "mlp.down_proj.weight": "hidden ffn"}),
)
_FINAL = Rule("decoder.final_layernorm.weight", {"model.norm.weight": "hidden"})
_QKV_BIAS = (
    Rule(
        _LAYER + "self_attention.linear_qkv.bias",
        {
            _HF + "self_attn.q_proj.bias": "q",
            _HF + "self_attn.k_proj.bias": "kv",
            _HF + "self_attn.v_proj.bias": "kv",
        },
        GROUPED,
    ),
)
_QK_NORM = (
    Rule(_LAYER + "self_attention.q_layernorm.weight", {_HF + "self_attn.q_norm.weight": "head"}),
    Rule(_LAYER + "self_attention.k_layernorm.weight", {_HF + "self_attn.k_norm.weight": "head"}),
)

LAYER_RULES: Mapping[str, tuple[Rule, ...]] = {
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER + _QKV_BIAS,
    "qwen3": _DECODER + _QK_NORM,
}
"""Rules of one layer, by family."""

_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # buffers that old exports carry; computed from the config


@dataclass(frozen=True)
class Tensor:
    """A rule applied to one layer of one model: concrete names and shapes."""

    key: str
    sources: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    layout: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the megatron-core tensor, vocabulary unpadded."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])


def _dimensions(shape: ModelShape) -> dict[str, int]:
    return {
        "hidden": shape.hidden,
        "vocab": shape.vocab_size,
        "ffn": shape.ffn,
        "q": shape.heads * shape.head_dim,
        "kv": shape.kv_heads * shape.head_dim,
        "head": shape.head_dim,
    }


def tensor_map(shape: ModelShape) -> list[Tensor]:
    """Every tensor of a model, in the order of the forward pass."""
    sizes = _dimensions(shape)

    def concrete(rule: Rule, layer: int = -1) -> Tensor:
        names = tuple(name.format(i=layer) for name in rule.sources)
        shapes = tuple(tuple(sizes[word] for word in words.split()) for words in rule.sources.values())
        return Tensor(rule.key.format(i=layer), names, shapes, rule.layout)

    tensors = [concrete(_EMBEDDING)]
    tensors += [concrete(rule, i) for i in range(shape.num_layers) for rule in LAYER_RULES[shape.family]]
    tensors.append(concrete(_FINAL))
    if not shape.tied:
        tensors.append(concrete(_OUTPUT))
    return tensors


def output_key(shape: ModelShape) -> str:
    """Name of the tensor that projects to the vocabulary."""
    return (_EMBEDDING if shape.tied else _OUTPUT).key


def is_ignored(name: str, shape: ModelShape) -> bool:
    """Whether a Hugging Face tensor carries nothing that the model needs."""
    return bool(_IGNORED.search(name)) or (shape.tied and name in _OUTPUT.sources)


def pack(tensor: Tensor, parts: list[torch.Tensor], shape: ModelShape) -> list[tuple[int, torch.Tensor]]:
    """Hugging Face tensors -> (first row, rows) chunks of the megatron-core tensor.

    Args:
        tensor: what is being made.
        parts: the sources in order, each of the shape that ``tensor.shapes`` says, all of one dtype.
        shape: the model.
    """
    if tensor.layout != GROUPED:
        rows = [0]
        for part in parts:
            rows.append(rows[-1] + part.shape[0])
        return list(zip(rows, parts, strict=False))
    # Per key/value group: its query heads, its key head, its value head.
    groups = [part.reshape(shape.kv_heads, -1, *part.shape[1:]) for part in parts]
    return [(0, torch.cat(groups, dim=1).reshape(tensor.shape))]


def unpack(tensor: Tensor, whole: torch.Tensor, shape: ModelShape) -> list[torch.Tensor]:
    """The inverse of :func:`pack` on the whole megatron-core tensor; may return views."""
    if tensor.layout != GROUPED:
        return list(whole.split([part[0] for part in tensor.shapes]))
    per_group = [part[0] // shape.kv_heads for part in tensor.shapes]
    groups = whole.reshape(shape.kv_heads, -1, *whole.shape[1:]).split(per_group, dim=1)
    return [group.reshape(part) for group, part in zip(groups, tensor.shapes, strict=True)]
