"""Slots of the cache, and attention over them, against dense attention in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from fire_megatron.data.packing import pack_rows
from fire_megatron.models import layers
from fire_megatron.models.kv_cache import KVCache, length_bucket
from fire_megatron.models.layers import CoreAttention
from fire_megatron.models.packed import packed_seq_params
from fire_megatron.models.rotary import rotate

HEADS, GROUPS, DIM = 4, 2, 8


def attention(grid, window):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        attention_dropout=0.0,
        window_size=None if window is None else (window - 1, 0),
    )
    return CoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=grid.pg)


def dense(query, keys, values, window):
    """The last token of a row against all of it, in float64: [Q, D], [n, G, D] -> [Q * D]."""
    first = 0 if window is None else max(0, len(keys) - window)
    keys, values = (x[first:].double().repeat_interleave(HEADS // GROUPS, 1) for x in (keys, values))
    scores = torch.einsum("hd,nhd->hn", query.double(), keys) / DIM**0.5
    return torch.einsum("hn,nhd->hd", scores.softmax(-1), values).flatten()


@pytest.mark.parametrize("window", [None, 5])
def test_decoding_in_slots_equals_dense_attention(grid, window):
    """Rows come in twice, at different lengths, one takes the place of another and one moves."""
    torch.manual_seed(0)
    layer, cache = attention(grid, window), KVCache(4, 40)
    layer.cache = cache
    rows = {}

    def prefill(slots, lengths):
        draw = [torch.randn(sum(lengths), heads, DIM) for heads in (HEADS, GROUPS, GROUPS)]
        pack = pack_rows(
            [torch.zeros(n, dtype=torch.int64) for n in lengths],
            [torch.zeros(0, dtype=torch.int64)] * len(lengths),
            range(len(lengths)),
            multiple=1,
            device=torch.device("cpu"),
        )
        cache.begin_prefill(slots, lengths)
        out = layer(*draw, None, packed_seq_params=packed_seq_params(pack))
        for slot, query, keys, values, made in zip(slots, *(x.split(lengths) for x in (*draw, out)), strict=True):
            rows[slot] = [keys, values]
            torch.testing.assert_close(
                made[-1].flatten().double(), dense(query[-1], keys, values, window), atol=1e-6, rtol=0
            )

    def decode(count):
        query, key, value = (torch.randn(1, count, heads, DIM) for heads in (HEADS, GROUPS, GROUPS))
        longest = int(cache.lengths[:count].max()) + 1
        cache.begin_decode(count, min(length_bucket(longest, torch.device("cpu")), cache.max_length))
        out = layer(query, key, value)
        cache.end_decode()
        for slot in range(count):
            rows[slot] = [torch.cat((old, new[:, slot])) for old, new in zip(rows[slot], (key, value), strict=True)]
            torch.testing.assert_close(
                out[0, slot].double(), dense(query[0, slot], *rows[slot], window), atol=1e-6, rtol=0
            )

    prefill([2, 0, 1], [7, 1, 12])
    for _ in range(4):
        decode(3)
    prefill([3, 1], [3, 6])
    for _ in range(3):
        decode(4)
    cache.move([3, 2], [0, 1], int(cache.lengths.max()))
    rows[0], rows[1] = rows[3], rows[2]
    for _ in range(2):
        decode(2)
    assert cache.lengths[:2].tolist() == [len(rows[slot][0]) for slot in range(2)]


def test_a_row_that_has_ended_stays_within_its_slot(grid):
    layer, cache = attention(grid, None), KVCache(2, 3)
    layer.cache = cache
    for step in range(2 * cache.max_length):
        cache.begin_decode(2, cache.max_length)
        out = layer(*(torch.full((1, 2, heads, DIM), float(step)) for heads in (HEADS, GROUPS, GROUPS)))
        assert out.isfinite().all()
        cache.end_decode()


@pytest.mark.parametrize("window", [None, 4])
def test_grouped_heads_under_a_mask_are_the_same_on_a_gpu(grid, window, monkeypatch):
    """Where no kernel takes both, heads are copied."""
    layer = attention(grid, window)
    draw = torch.randn(3, HEADS, DIM), torch.randn(9, GROUPS, DIM), torch.randn(9, GROUPS, DIM)
    expected = layer._attend(*draw)
    seen = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(layers, "device_kind", lambda device: "cuda")
    monkeypatch.setattr(
        layers.F, "scaled_dot_product_attention", lambda *args, **kwargs: seen.append(kwargs) or kernel(*args, **kwargs)
    )
    torch.testing.assert_close(layer._attend(*draw), expected)
    assert [call["enable_gqa"] for call in seen] == [False] and seen[0]["attn_mask"] is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_megatrons_bit_by_bit(dtype):
    x, positions = torch.randn(11, HEADS, DIM).to(dtype), torch.tensor([0, 1, 2, 0, 5, 100, 3, 4, 9, 77, 1])
    angles = positions[:, None, None].float() * (10000.0 ** -(torch.arange(0, DIM, 2) / DIM))
    angles = torch.cat((angles, angles), -1)
    theirs = _apply_rotary_pos_emb_bshd(x[:, None], angles[:, None]).squeeze(1)
    assert torch.equal(rotate(x, (angles.cos().to(dtype), angles.sin().to(dtype))), theirs)


@given(length=st.integers(1, 200_000))
def test_buckets_are_few_and_tight(length):
    for device, smallest in ((torch.device("cpu"), 16), (torch.device("cuda"), 64)):
        bucket = length_bucket(length, device)
        assert length <= bucket <= max(1.25 * length, length + smallest)
        assert length_bucket(bucket, device) == bucket
