"""Attention over context ranks equals dense attention over whole rows, forward and backward."""

import math

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig

from fire_megatron.data.packing import pack_rows, zigzag
from fire_megatron.models.layers import CoreAttention
from fire_megatron.models.packed import packed_seq_params
from fire_megatron.parallel.collectives import gather_with_gradient
from fire_megatron.parallel.grid import GridFactory, Layout

LENGTHS = ((1, 0), (3, 2), (9, 14), (2, 61), (5, 3))
"""Prompts and responses: shorter than the chunks are many, and far longer than the window."""
HEADS = {"one key head for all": (4, 1), "grouped": (6, 2), "a key head each": (3, 3)}
DIM = 8


@pytest.fixture(scope="module")
def context_grid(world):
    """All ranks share each sequence."""
    return GridFactory(timeout=60).grid(Layout(context=world.size, num_ranks=world.size))


def dense_attention(query, key, value, starts, window):
    """[T, Q, D], [T, G, D] -> [T, Q, D] by the definition: softmax over the row's earlier positions in the window."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    places = torch.arange(len(query))
    row = torch.bucketize(places, torch.tensor(starts[1:]), right=True)
    distance = places[:, None] - places
    allowed = (row[:, None] == row) & (distance >= 0) & (distance < (window or len(query)))
    scores = torch.einsum("sqd,tqd->qst", query, key) / math.sqrt(DIM)
    return torch.einsum("qst,tqd->sqd", scores.masked_fill(~allowed, -math.inf).softmax(-1), value)


@pytest.mark.parametrize("window", [None, 1, 7, 1000])
@pytest.mark.parametrize("heads", HEADS)
def test_equals_dense_attention(context_grid, heads, window):
    ranks, rank = context_grid.layout.context, context_grid.cp_rank
    queries, groups = HEADS[heads]
    config = TransformerConfig(
        num_layers=1,
        hidden_size=queries * DIM,
        num_attention_heads=queries,
        num_query_groups=groups,
        kv_channels=DIM,
        attention_dropout=0.0,
        window_size=None if window is None else (window - 1, 0),
        context_parallel_size=ranks,
    )
    attention = CoreAttention(config, 1, None, "self", pg_collection=context_grid.pg)
    prompts, responses = ([torch.ones(pair[i], dtype=torch.int64) for pair in LENGTHS] for i in (0, 1))
    options = {"device": torch.device("cpu"), "context": ranks, "context_rank": rank}
    pack = pack_rows(prompts, responses, range(len(LENGTHS)), multiple=1, **options)
    starts = pack.cu_seqlens.tolist()
    generator = torch.Generator().manual_seed(1)
    draw = [
        torch.randn(starts[-1], count, DIM, generator=generator, dtype=torch.float64)
        for count in (queries, groups, groups, queries)
    ]
    whole = [tensor.clone().requires_grad_() for tensor in draw[:3]]
    expected = dense_attention(*whole, starts, window)
    (expected * draw[3]).sum().backward()

    mine = zigzag(starts, ranks, rank)
    local = [tensor[mine].clone().requires_grad_() for tensor in draw[:3]]
    out = attention(*local, packed_seq_params=packed_seq_params(pack))
    (out * draw[3][mine]).sum().backward()
    torch.testing.assert_close(out, expected[mine], rtol=0, atol=1e-12)
    for ours, theirs in zip(local, whole, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad[mine], rtol=0, atol=1e-12)


def test_gather_sums_what_all_ranks_say(context_grid):
    group, rank, ranks = context_grid.pg.cp, context_grid.cp_rank, context_grid.layout.context
    values = torch.full((2, 3), float(rank), requires_grad=True)
    gathered = gather_with_gradient(values, group=group)
    assert gathered[:, 0].tolist() == [float(r) for r in range(ranks) for _ in range(2)]
    weights = torch.arange(gathered.numel(), dtype=torch.float32).view_as(gathered) + 100 * rank
    (gathered * weights).sum().backward()
    total = weights.clone()
    dist.all_reduce(total, group=group)
    assert torch.equal(values.grad, total[2 * rank : 2 * rank + 2])
