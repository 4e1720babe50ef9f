"""A world of many ranks and a GPU, both pretended, for building Transformer Engine's models where there is neither.

Transformer Engine's modules can be built, not run, without a GPU once torch.cuda's questions are answered as on one.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from fire_megatron.models import build, experts, kv_cache, layers
from fire_megatron.parallel import collectives
from fire_megatron.parallel.grid import GridFactory, Layout, ModelGrid
from fire_megatron.platform import cpu_seam

HOPPER, BLACKWELL = (9, 0), (10, 0)


def pretend_gpu(capability: tuple[int, int] = HOPPER) -> None:
    """Answer as a GPU of this compute capability would, with the CPU as the device."""
    cpu_seam.install()
    for module in (build, experts, kv_cache, layers):
        module.compute_device = lambda: torch.device("cpu")
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.Stream = type("Stream", (), {"__init__": lambda *_, **__: None})
    torch.cuda.get_device_capability = lambda *_: capability
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(
        name="GPU", total_memory=80 << 30, multi_processor_count=132, major=capability[0], minor=capability[1]
    )


def forget_gpu() -> None:
    """Let Transformer Engine look at the GPU again, of whose capability it keeps what it has found."""
    from transformer_engine.pytorch import quantization, utils

    for name in ("get_device_compute_capability", "_get_device_compute_capability"):
        getattr(getattr(utils, name, None), "cache_clear", lambda: None)()
    for name in vars(quantization):
        if name.endswith("_SUPPORT"):
            setattr(quantization, name, None)


def enter(rank: int, size: int) -> GridFactory:
    """Be this rank of a new world, in which collectives return at once and leave their outputs as they were."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    sys.excepthook = sys.__excepthook__  # each world would put its rank before every line of an error
    collectives._raise_on_any = _raise
    return GridFactory(timeout=10.0)


def grid_of(rank: int, size: int, **layout: int) -> ModelGrid:
    """The grid over all ranks of such a world."""
    return enter(rank, size).grid(Layout(num_ranks=size, **layout))


def _raise(problem: Exception | None, *, group: dist.ProcessGroup) -> None:
    if problem is not None:
        raise problem
