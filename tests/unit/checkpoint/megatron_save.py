"""Run by test_torch_dist.py: megatron-core's own save of a converted model.

In a process of its own: it forks its writers, which lock up where the forking process has run OpenMP threads.
"""

import sys

from megatron.core import dist_checkpointing

from fire_megatron.checkpoint.loading import load_weights
from fire_megatron.config.hf_config import read_hf_config
from fire_megatron.config.schema import StudentConfig
from fire_megatron.models.build import build_model
from fire_megatron.parallel.grid import GridFactory, Layout
from fire_megatron.platform import launch
from fire_megatron.platform.device import Device


def main() -> None:
    """Arguments: converted checkpoint; existing folder to save to."""
    folder, out = sys.argv[1:]
    launch.start("cpu", threads=1)
    grid = GridFactory(timeout=60).grid(Layout())
    role = StudentConfig(checkpoint=folder, vocab_multiple=4)
    model = build_model(read_hf_config(folder), role, grid, device=Device("cpu"))
    load_weights(model, folder, grid=grid)
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": grid.pg.dp_cp}
    dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), out)
    launch.stop()


if __name__ == "__main__":
    main()
