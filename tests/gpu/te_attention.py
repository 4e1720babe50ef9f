"""Run by test_on_gpu.py under torchrun: Transformer Engine's attention of packs against ours, on all GPUs as context
ranks. Exits non-zero when they differ."""

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from fire_megatron.data.packing import pack_rows, zigzag
from fire_megatron.models.layers import CoreAttention
from fire_megatron.models.packed import packed_seq_params
from fire_megatron.models.te_attention import TEAttention
from fire_megatron.parallel.grid import GridFactory, Layout
from fire_megatron.platform import launch
from fire_megatron.platform.device import compute_device

LENGTHS = ((3, 4), (200, 120), (1, 0), (17, 900))
"""Prompts and responses of the pack's rows."""
HEADS, GROUPS, DIM = 8, 2, 64


def compare(grid, window):
    """Largest difference of outputs and gradients over the largest value, of attention in bfloat16 from ours in float32
    on the same rounded inputs."""
    device, ranks, rank = compute_device(), grid.layout.context, grid.cp_rank
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=DIM,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        window_size=None if window is None else (window - 1, 0),
        context_parallel_size=ranks,
    )
    arguments = (config, 1, AttnMaskType.causal, "self")
    fused = TEAttention(*arguments, pg_collection=grid.pg)
    ours = CoreAttention(*arguments, pg_collection=grid.pg)
    rows = [[torch.ones(pair[i], dtype=torch.int64) for pair in LENGTHS] for i in (0, 1)]
    pack = pack_rows(*rows, range(len(LENGTHS)), multiple=1, device=device, context=ranks, context_rank=rank)
    starts, params = pack.cu_seqlens.tolist(), packed_seq_params(pack)
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(starts[-1], n, DIM, generator=generator) for n in (HEADS, GROUPS, GROUPS, HEADS)]
    mine = zigzag(starts, ranks, rank)
    rounded = [tensor[mine].bfloat16().to(device) for tensor in draw]
    results = []
    for attention, dtype in ((fused, torch.bfloat16), (ours, torch.float32)):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in rounded[:3]]
        out = attention(*inputs, None, AttnMaskType.causal, packed_seq_params=params)
        out = out.reshape(len(mine), HEADS, DIM)
        (out * rounded[3].to(dtype)).sum().backward()
        results.append([out.detach(), *(tensor.grad for tensor in inputs)])
    return max(
        float((theirs.float() - exact).abs().max() / exact.abs().max()) for theirs, exact in zip(*results, strict=True)
    )


def main():
    """All ranks are context ranks of one replica."""
    world = launch.start("cuda")
    grid = GridFactory(timeout=60).grid(Layout(context=world.size, num_ranks=world.size))
    for window in (None, 40):
        apart = compare(grid, window)
        assert apart < 2e-2, f"window {window}, {world.size} context ranks: {apart:.1e} apart"
    launch.stop()


if __name__ == "__main__":
    main()
