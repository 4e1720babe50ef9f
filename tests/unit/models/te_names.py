"""Run by test_te_spec.py: the names and shapes of a Transformer Engine model, built where there is no GPU.

Reads cases as JSON: arguments of :func:`report`. Prints, for each, the names and whole shapes that the model has and
that a checkpoint has, and how its attention is called.
"""

import json
import sys

import torch
import torch.distributed as dist
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from te_world import grid_of, pretend_gpu

from fire_megatron.checkpoint.maps import tensor_map
from fire_megatron.checkpoint.shards import Shard, model_shards
from fire_megatron.config.hf_config import read_hf_config
from fire_megatron.config.schema import RoleConfig
from fire_megatron.data.packing import pack_rows
from fire_megatron.models import build
from fire_megatron.models.kv_cache import KVCache
from fire_megatron.models.layers import CoreAttention
from fire_megatron.models.packed import packed_seq_params
from fire_megatron.platform.device import Device


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
    if context == 1:
        # What the fused attention does not take goes through ours.
        attention(*(x.float() for x in draw), None, AttnMaskType.causal, packed_seq_params=params)
        # Packs of prompts go through it too, once the cache has them.
        attention.cache = KVCache(2, 14)
        attention.cache.begin_prefill([1, 0], [len(r) * 2 for r in rows])
        assert len(calls) == 1
        attention(*draw, None, AttnMaskType.causal, packed_seq_params=params)
        assert len(calls) == 2 and attention.cache.nbytes > 0
    else:  # in generation a context rank has prompts of its own, of which the others know nothing
        whole = pack_rows(rows, rows, [0, 1], multiple=1, device=torch.device("cpu"))
        own = [torch.randn(whole.token_ids.shape[1], heads, 16, dtype=torch.bfloat16) for heads in (2, 1, 1)]
        attention(*own, None, AttnMaskType.causal, packed_seq_params=packed_seq_params(whole))
        assert len(calls) == 1
    call = calls[0]
    return {
        "class": type(attention).__name__,
        "context_ranks": fused.cp_group and dist.get_process_group_ranks(fused.cp_group),
        "mask": call["attn_mask_type"],
        "boundaries": call["cu_seqlens_q"].tolist(),
        "one_tensor": len({id(value) for key, value in call.items() if key.startswith("cu_seqlens")}) == 1,
        "longest": call["max_seqlen_q"],
        "out": list(out.shape),
        "seen_by_megatron": next(m for m in model.modules() if isinstance(m, Attention)).pg_collection.cp.size(),
    }


def report(folder: str, tensor: int, context: int, expert: int, sequential: bool) -> dict:
    """Of this one rank's part of a model whose config.json is in a folder; ``sequential``: experts one by one."""
    shape, ranks = read_hf_config(folder), tensor * max(context, expert)
    grid = grid_of(0, ranks, tensor=tensor, context=context, expert=expert)
    megatron = {"moe_grouped_gemm": False} if sequential else {}
    role = RoleConfig(checkpoint=folder, layer_spec="te", megatron=megatron)
    model = build.build_model(shape, role, grid, device=Device("cuda"))
    shards = model_shards(model, grid=grid)
    check_coverage(shards, expert)
    return {
        "found": {shard.key: list(shard.global_shape) for shard in shards},
        "wanted": {t.key: list(t.shape) for t in tensor_map(shape)},
        "layers": sorted({type(m).__name__ for m in model.modules()}),
        "attention": attention_report(model, context),
        "windows": [list(m.fused.window_size) for m in model.modules() if isinstance(m, CoreAttention)],
        "communications": [m.fused.cp_comm_type for m in model.modules() if isinstance(m, CoreAttention)],
    }


if __name__ == "__main__":
    pretend_gpu()
    print(json.dumps([report(*case) for case in json.load(sys.stdin)]))
