"""Which Hugging Face tensors make up which megatron-core tensor, one table a family.

A rule names a megatron-core tensor (as ``GPTModel.sharded_state_dict`` calls it, with the layer's global number), the
Hugging Face tensors it is made of with their shapes in words, and how they are put together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from fire_megatron.config.hf_config import ModelShape

PLAIN, STACK, GROUPED = "plain", "stack", "grouped"
"""One tensor as it is; tensors under one another; q, k and v interleaved by key/value group."""


@dataclass(frozen=True)
class Rule:
    """One megatron-core tensor. ``{i}`` in names stands for every layer, ``{j}`` for every expert."""

    key: str
    sources: Mapping[str, str]
    """Hugging Face name -> shape in words; see :func:`_dimensions`."""
    layout: str = PLAIN
    by_expert: bool = False
    """Whether the tensor stacks one such tensor for each expert, along a new first dimension."""
    fused: Mapping[str, str] | None = None
    """Sources of a folder that holds the experts stacked already, in place of ``sources``."""


_LAYER, _HF = "decoder.layers.{i}.", "model.layers.{i}."
_EMBEDDING = Rule("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "vocab hidden"})
_OUTPUT = Rule("output_layer.weight", {"lm_head.weight": "vocab hidden"})
_ATTENTION = (
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
)
_MLP = (
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
_EXPERTS = (
    Rule(_LAYER + "pre_mlp_layernorm.weight", {_HF + "post_attention_layernorm.weight": "hidden"}),
    Rule(_LAYER + "mlp.router.weight", {_HF + "mlp.gate.weight": "experts hidden"}),
    Rule(
        _LAYER + "mlp.experts.experts.linear_fc1.weight",
        {
            _HF + "mlp.experts.{j}.gate_proj.weight": "expert_ffn hidden",
            _HF + "mlp.experts.{j}.up_proj.weight": "expert_ffn hidden",
        },
        STACK,
        by_expert=True,
        fused={_HF + "mlp.experts.gate_up_proj": "experts 2*expert_ffn hidden"},
    ),
    Rule(
        _LAYER + "mlp.experts.experts.linear_fc2.weight",
        {_HF + "mlp.experts.{j}.down_proj.weight": "hidden expert_ffn"},
        by_expert=True,
        fused={_HF + "mlp.experts.down_proj": "experts hidden expert_ffn"},
    ),
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


def _fused(rules: tuple[Rule, ...], fused: Mapping[str, Mapping[str, str]]) -> tuple[Rule, ...]:
    """Rules with other sources where a family stores what these name in one tensor."""
    return tuple(replace(rule, sources=fused.get(rule.key, rule.sources)) for rule in rules)


_PHI3 = _fused(
    _ATTENTION + _MLP,
    {
        _LAYER + "self_attention.linear_qkv.weight": {_HF + "self_attn.qkv_proj.weight": "q+2*kv hidden"},
        _LAYER + "mlp.linear_fc1.weight": {_HF + "mlp.gate_up_proj.weight": "2*ffn hidden"},
    },
)

LAYER_RULES: Mapping[str, tuple[Rule, ...]] = {
    "llama": _ATTENTION + _MLP,
    "mistral": _ATTENTION + _MLP,
    "phi3": _PHI3,
    "qwen2": _ATTENTION + _MLP + _QKV_BIAS,
    "qwen3": _ATTENTION + _MLP + _QK_NORM,
    "qwen3_moe": _ATTENTION + _QK_NORM + _EXPERTS,
}
"""Rules of one layer, by family."""


def _layer_rules(shape: ModelShape, layer: int) -> tuple[Rule, ...]:
    rules = LAYER_RULES[shape.family]
    if shape.experts is None or shape.has_experts(layer):
        return rules
    return tuple(rule for rule in rules if rule not in _EXPERTS) + _MLP


_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # buffers that old exports carry; computed from the config


@dataclass(frozen=True)
class Tensor:
    """A rule applied to one layer of one model: concrete names and shapes."""

    key: str
    sources: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    layout: str
    experts: int = 0
    """Experts stacked along the first dimension, their sources one expert after the other; 0 where there are none."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the megatron-core tensor, vocabulary unpadded."""
        if self.experts:
            return (self.experts, *self.part(0).shape)
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def part(self, expert: int) -> Tensor:
        """One expert's part as a tensor of its own, without the first dimension."""
        each = len(self.sources) // self.experts
        chosen = slice(expert * each, (expert + 1) * each)
        return replace(self, sources=self.sources[chosen], shapes=self.shapes[chosen], experts=0)

    def parts(self) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """(leading offset, part) of what is converted at a time: every expert, or the whole tensor."""
        if self.experts:
            for expert in range(self.experts):
                yield (expert,), self.part(expert)
        else:
            yield (), self


def _dimensions(shape: ModelShape) -> dict[str, int]:
    sizes = {
        "hidden": shape.hidden,
        "vocab": shape.vocab_size,
        "ffn": shape.ffn,
        "q": shape.heads * shape.head_dim,
        "kv": shape.kv_heads * shape.head_dim,
        "q+2*kv": (shape.heads + 2 * shape.kv_heads) * shape.head_dim,
        "2*ffn": 2 * shape.ffn,
        "head": shape.head_dim,
    }
    if shape.experts:
        ffn = shape.experts.ffn
        sizes |= {"experts": shape.experts.count, "expert_ffn": ffn, "2*expert_ffn": 2 * ffn}
    return sizes


def _concrete(rule: Rule, layer: int, shape: ModelShape, fused: bool) -> Tensor:
    sizes = _dimensions(shape)
    stacked = rule.by_expert and fused
    sources = rule.fused if stacked and rule.fused else rule.sources
    experts = shape.experts.count if shape.experts and rule.by_expert and not stacked else 0
    names, shapes = [], []
    for j in range(max(experts, 1)):
        names += [name.format(i=layer, j=j) for name in sources]
        shapes += [tuple(sizes[word] for word in words.split()) for words in sources.values()]
    return Tensor(rule.key.format(i=layer), tuple(names), tuple(shapes), PLAIN if stacked else rule.layout, experts)


def tensor_map(shape: ModelShape, *, fused: bool = False) -> list[Tensor]:
    """Every tensor of a model, in the order of the forward pass.

    Args:
        shape: the model.
        fused: whether the Hugging Face names are those of a folder that holds the experts of a layer stacked in one
            tensor, as transformers has them in memory; published checkpoints hold them one by one.
    """
    tensors = [_concrete(_EMBEDDING, -1, shape, fused)]
    tensors += [_concrete(rule, i, shape, fused) for i in range(shape.num_layers) for rule in _layer_rules(shape, i)]
    tensors.append(_concrete(_FINAL, -1, shape, fused))
    if not shape.tied:
        tensors.append(_concrete(_OUTPUT, -1, shape, fused))
    return tensors


def holds_fused_experts(names: Iterable[str], shape: ModelShape) -> bool:
    """Whether a folder with tensors of these Hugging Face names holds the experts of a layer stacked in one tensor."""
    layers = [i for i in range(shape.num_layers) if shape.has_experts(i)]
    fused = {name.format(i=i) for i in layers for rule in _layer_rules(shape, i) for name in rule.fused or ()}
    return not fused.isdisjoint(names)


def output_key(shape: ModelShape) -> str:
    """Name of the tensor that projects to the vocabulary."""
    return (_EMBEDDING if shape.tied else _OUTPUT).key


def output_sources() -> tuple[str, ...]:
    """Hugging Face names of what an untied model projects to the vocabulary with."""
    return tuple(_OUTPUT.sources)


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
    if len(parts) == 1:  # q, k and v under one another
        parts = list(parts[0].split(_grouped_rows(shape)))
    groups = [part.reshape(shape.kv_heads, -1, *part.shape[1:]) for part in parts]
    return [(0, torch.cat(groups, dim=1).reshape(tensor.shape))]


def unpack(tensor: Tensor, whole: torch.Tensor, shape: ModelShape) -> list[torch.Tensor]:
    """The inverse of :func:`pack` on the whole megatron-core tensor; may return views."""
    if tensor.layout != GROUPED:
        return list(whole.split([part[0] for part in tensor.shapes]))
    per_group = [rows // shape.kv_heads for rows in _grouped_rows(shape)]
    groups = whole.reshape(shape.kv_heads, -1, *whole.shape[1:]).split(per_group, dim=1)
    parts = [group.reshape(-1, *whole.shape[1:]) for group in groups]
    return [torch.cat(parts)] if len(tensor.shapes) == 1 else parts


def _grouped_rows(shape: ModelShape) -> tuple[int, int, int]:
    """Rows of q, k and v."""
    return shape.heads * shape.head_dim, *(shape.kv_heads * shape.head_dim,) * 2
