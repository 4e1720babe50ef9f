"""Run by test_te_spec.py: the names and shapes of a Transformer Engine model, built where there is no GPU.

Transformer Engine's modules can be built, not run, without a GPU once torch.cuda's questions are answered as on one.
Prints the names and whole shapes that the model has and that a checkpoint has, as JSON.
"""

import json
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from fire_megatron.checkpoint.maps import tensor_map
from fire_megatron.checkpoint.shards import model_shards
from fire_megatron.config.schema import RoleConfig
from fire_megatron.models import build
from fire_megatron.models.hf_config import read_hf_config
from fire_megatron.parallel.grid import GridFactory, Layout
from fire_megatron.platform import Device, cpu_seam


def pretend_gpu() -> None:
    """Answer as an H100 would, with the CPU as the device."""
    cpu_seam.install()
    build.compute_device = lambda: torch.device("cpu")
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(
        name="H100", total_memory=80 << 30, multi_processor_count=132, major=9, minor=0
    )


def main() -> None:
    """Arguments: folder with a config.json; tensor-parallel size."""
    folder, tensor = sys.argv[1], int(sys.argv[2])
    shape = read_hf_config(folder)
    pretend_gpu()
    dist.init_process_group("fake", rank=0, world_size=tensor, store=FakeStore())
    grid = GridFactory(timeout=10.0).grid(Layout(tensor=tensor, num_ranks=tensor))
    role = RoleConfig(checkpoint=folder, layer_spec="te")
    model = build.build_model(shape, role, grid, device=Device("cuda"))
    found = {shard.key: list(shard.global_shape) for shard in model_shards(model, grid=grid)}
    wanted = {t.key: list(t.shape) for t in tensor_map(shape)}
    print(json.dumps({"found": found, "wanted": wanted, "layers": sorted({type(m).__name__ for m in model.modules()})}))


if __name__ == "__main__":
    main()
