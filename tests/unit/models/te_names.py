"""Run by test_te_spec.py: the names and shapes of a Transformer Engine model, built where there is no GPU.

Transformer Engine's modules can be built, not run, without a GPU once torch.cuda's questions are answered as on one.
Prints, as JSON, the names and whole shapes that the model has and that a checkpoint has, and how its attention is
called.
"""

import json
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from torch.testing._internal.distributed.fake_pg import FakeStore

from fire_megatron.checkpoint.maps import tensor_map
from fire_megatron.checkpoint.shards import model_shards
from fire_megatron.config.schema import RoleConfig
from fire_megatron.data.packing import pack_rows
from fire_megatron.models import build, layers
from fire_megatron.models.hf_config import read_hf_config
from fire_megatron.models.layers import CoreAttention, KVCache
from fire_megatron.models.packed import packed_seq_params
from fire_megatron.parallel.grid import GridFactory, Layout
from fire_megatron.platform import Device, cpu_seam


def pretend_gpu() -> None:
    """Answer as an H100 would, with the CPU as the device."""
    cpu_seam.install()
    build.compute_device = layers.compute_device = lambda: torch.device("cpu")
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.Stream = lambda *_, **__: None
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(
        name="H100", total_memory=80 << 30, multi_processor_count=132, major=9, minor=0
    )


def attention_report(model: build.FireGPT, context: int) -> dict:
    """How Transformer Engine's attention was built, and what a pack's forward pass would call it with."""
    from transformer_engine.pytorch import DotProductAttention

    attention = next(m for m in model.modules() if isinstance(m, CoreAttention))
    fused, calls = attention.fused, []
    DotProductAttention.forward = lambda self, *args, **kwargs: calls.append(kwargs) or args[0].flatten(1)
    rows = [torch.arange(1, 8), torch.arange(1, 4)]
    pack = pack_rows(rows, rows, [0, 1], multiple=1, device=torch.device("cpu"), context=context)
    params = packed_seq_params(pack)
    draw = [torch.randn(pack.token_ids.shape[1], heads, 16, dtype=torch.bfloat16) for heads in (2, 1, 1)]
    out = attention(*draw, None, AttnMaskType.causal, packed_seq_params=params)
    if context == 1:  # what the fused attention does not take goes through ours
        attention(*(x.float() for x in draw), None, AttnMaskType.causal, packed_seq_params=params)
        attention.cache = KVCache(2, 14)
        attention(*draw, None, AttnMaskType.causal, packed_seq_params=params)
    (call,) = calls
    return {
        "class": type(attention).__name__,
        "context_ranks": fused.cp_group and dist.get_process_group_ranks(fused.cp_group),
        "communication": fused.cp_comm_type,
        "window": list(fused.window_size),
        "mask": call["attn_mask_type"],
        "boundaries": call["cu_seqlens_q"].tolist(),
        "one_tensor": len({id(value) for key, value in call.items() if key.startswith("cu_seqlens")}) == 1,
        "longest": call["max_seqlen_q"],
        "out": list(out.shape),
        "seen_by_megatron": next(m for m in model.modules() if isinstance(m, Attention)).pg_collection.cp.size(),
    }


def main() -> None:
    """Arguments: folder with a config.json; tensor- and context-parallel size."""
    folder, tensor, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    shape = read_hf_config(folder)
    pretend_gpu()
    dist.init_process_group("fake", rank=0, world_size=tensor * context, store=FakeStore())
    layout = Layout(tensor=tensor, context=context, num_ranks=tensor * context)
    grid = GridFactory(timeout=10.0).grid(layout)
    role = RoleConfig(checkpoint=folder, layer_spec="te")
    model = build.build_model(shape, role, grid, device=Device("cuda"))
    found = {shard.key: list(shard.global_shape) for shard in model_shards(model, grid=grid)}
    wanted = {t.key: list(t.shape) for t in tensor_map(shape)}
    report = {
        "found": found,
        "wanted": wanted,
        "layers": sorted({type(m).__name__ for m in model.modules()}),
        "attention": attention_report(model, context),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
