"""The tensor maps against transformers' own models: every parameter once, in its own shape."""

from __future__ import annotations

import collections
import json

import pytest
import torch
from models import FAMILIES, make_hf, stacked_experts
from safetensors.torch import load_file

from fire_megatron.checkpoint.maps import GROUPED, LAYER_RULES, is_ignored, pack, tensor_map, unpack
from fire_megatron.config import hf_config


def model_and_shape(family, tmp_path):
    """A transformers model and its shape as read from its own config."""
    model = make_hf(family, num_hidden_layers=3)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    return model, hf_config.read_hf_config(tmp_path)


def test_every_family_has_a_table():
    assert LAYER_RULES.keys() == hf_config.FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_mapped_once(family, tmp_path):
    model, shape = model_and_shape(family, tmp_path)
    tensors = tensor_map(shape, fused=True)  # as transformers has the experts in memory
    names = collections.Counter(name for tensor in tensors for name in tensor.sources)
    assert max(names.values()) == 1
    assert len({tensor.key for tensor in tensors}) == len(tensors)
    mapped = {name: size for t in tensors for name, size in zip(t.sources, t.shapes, strict=True)}
    assert mapped == {name: tuple(p.shape) for name, p in stacked_experts(dict(model.named_parameters())).items()}, (
        "tied weights come once"
    )
    assert not any(is_ignored(name, shape) for name in mapped)
    assert is_ignored("lm_head.weight", shape) == shape.tied
    assert is_ignored("model.layers.0.self_attn.rotary_emb.inv_freq", shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_pack_and_unpack(family, tmp_path):
    """Chunks cover the megatron tensor without gap or overlap, and come apart as they went in."""
    model, shape = model_and_shape(family, tmp_path)
    parameters = stacked_experts(dict(model.named_parameters()))
    for tensor in tensor_map(shape, fused=True):
        parts = [parameters[name].detach() for name in tensor.sources]
        whole, covered = torch.full(tensor.shape, torch.nan), torch.zeros(tensor.shape)
        for row, part in pack(tensor, parts, shape):
            whole[row : row + len(part)] = part
            covered[row : row + len(part)] += 1
        assert torch.equal(covered, torch.ones(tensor.shape)), tensor.key
        for name, part, original in zip(tensor.sources, unpack(tensor, whole, shape), parts, strict=True):
            assert torch.equal(part, original), name


def test_q_k_and_v_stand_by_group(tmp_path):
    """megatron-core's order: the query heads of a key/value group, its key head, its value head; then the next."""
    _, shape = model_and_shape("qwen3", tmp_path)
    tensor = next(t for t in tensor_map(shape) if t.layout == GROUPED)
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (4, 2, 24)
    marked = []
    for letter, heads in ((100, 4), (200, 2), (300, 2)):
        numbers = torch.arange(heads).repeat_interleave(shape.head_dim) + letter
        marked.append(numbers[:, None].expand(-1, shape.hidden).float())
    [(row, whole)] = pack(tensor, marked, shape)
    assert row == 0 and whole.shape == tensor.shape
    assert whole[:: shape.head_dim, 0].tolist() == [100, 101, 200, 300, 102, 103, 201, 301]


def test_experts_one_by_one_are_those_that_are_stacked(tmp_path):
    """Published checkpoints hold each expert's matrices; both tables make the same megatron-core tensors of them."""
    model, shape = model_and_shape("qwen3-moe", tmp_path)
    model.save_pretrained(tmp_path / "published")
    held = load_file(tmp_path / "published" / "model.safetensors")
    single, fused = tensor_map(shape), tensor_map(shape, fused=True)
    assert {name for tensor in single for name in tensor.sources} == held.keys()
    assert [(t.key, t.shape) for t in single] == [(t.key, t.shape) for t in fused]
    parameters, stacked = stacked_experts(dict(model.named_parameters())), 0
    for tensor, whole in zip(single, fused, strict=True):
        for where, piece in tensor.parts():
            chunks = [chunk for _, chunk in pack(piece, [held[name] for name in piece.sources], shape)]
            parts = [parameters[name].detach() for name in whole.sources]
            expected = torch.cat([chunk for _, chunk in pack(whole, parts, shape)])
            assert torch.equal(torch.cat(chunks), expected[where]), tensor.key
            stacked += bool(where)
    assert stacked == 3 * 2 * 4, "layers, matrices, experts"
