"""Run by test_te_spec.py: the names and shapes of a Transformer Engine model, built where there is no GPU.

Transformer Engine's modules can be built, not run, without a GPU once torch.cuda's questions are answered as on one.
Prints, as JSON, the names and whole shapes that the model has and that a checkpoint has, and how its attention is
called.
"""

import argparse
import json
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from torch.testing._internal.distributed.fake_pg import FakeStore

from fire_megatron.checkpoint.maps import tensor_map
from fire_megatron.checkpoint.shards import Shard, model_shards
from fire_megatron.config.schema import RoleConfig
from fire_megatron.data.packing import pack_rows
from fire_megatron.models import build, experts, layers
from fire_megatron.models.hf_config import read_hf_config
from fire_megatron.models.layers import CoreAttention, KVCache
from fire_megatron.models.packed import packed_seq_params
from fire_megatron.parallel.grid import GridFactory, Layout
from fire_megatron.platform import Device, cpu_seam


def pretend_gpu() -> None:
    """Answer as an H100 would, with the CPU as the device."""
    cpu_seam.install()
    build.compute_device = experts.compute_device = layers.compute_device = lambda: torch.device("cpu")
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.Stream = lambda *_, **__: None
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(
        name="H100", total_memory=80 << 30, multi_processor_count=132, major=9, minor=0
    )


def check_coverage(shards: list[Shard], expert: int) -> None:
    """Of every stacked tensor this rank holds its share of the experts, each of them once."""
    by_key: dict[str, list[int]] = {}
    for shard in shards:
        assert shard.view.untyped_storage().data_ptr() == shard.parameter.untyped_storage().data_ptr(), shard.key
        if len(shard.global_shape) == 3:
            halves = 2 if "linear_fc1" in shard.key else 1
            by_key.setdefault(f"{shard.key}/{halves}", []).append(shard.offset[0])
    for name, held in by_key.items():
        count = next(s.global_shape[0] for s in shards if s.key == name.split("/")[0])
        assert sorted(held) == sorted([*range(count // expert)] * int(name[-1])), (name, held)


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
    """See ``--help``; the model is this one rank's part of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", help="with a config.json")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--context", type=int, default=1)
    parser.add_argument("--expert", type=int, default=1)
    parser.add_argument("--sequential", action="store_true", help="experts one after the other")
    args = parser.parse_args()
    shape, ranks = read_hf_config(args.folder), args.tensor * max(args.context, args.expert)
    pretend_gpu()
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    layout = Layout(tensor=args.tensor, context=args.context, expert=args.expert, num_ranks=ranks)
    grid = GridFactory(timeout=10.0).grid(layout)
    megatron = {"moe_grouped_gemm": False} if args.sequential else {}
    role = RoleConfig(checkpoint=args.folder, layer_spec="te", megatron=megatron)
    model = build.build_model(shape, role, grid, device=Device("cuda"))
    shards = model_shards(model, grid=grid)
    found = {shard.key: list(shard.global_shape) for shard in shards}
    check_coverage(shards, args.expert)
    wanted = {t.key: list(t.shape) for t in tensor_map(shape)}
    report = {
        "found": found,
        "wanted": wanted,
        "layers": sorted({type(m).__name__ for m in model.modules()}),
        "attention": attention_report(model, args.context),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
