"""Two processes as srun starts them: they meet, refuse GPUs that do not fit, add up and leave."""

from __future__ import annotations

import subprocess

from processes import command, environment, free_ports

RANK = """
import sys, torch
from types import SimpleNamespace
from unittest import mock
from fire_megatron.platform import launch
from fire_megatron.platform.device import Device
from fire_megatron.config.errors import UserError
from fire_megatron.platform import launch
launch.raise_on_any_rank(None, timeout=60)
rank = launch.launched_rank()

def refused(said, *, setting="auto", gpus=1, driver=True):
    pretended = {
        "is_available": lambda: driver, "device_count": lambda: gpus, "set_device": lambda index: None,
        "get_device_properties": lambda index: SimpleNamespace(uuid="5f1c"),
    }
    with mock.patch.multiple(torch.cuda, **pretended):
        try:
            launch.start(setting, timeout=60)
        except UserError as error:
            assert error.everywhere and said in str(error), error
            print("refused")

refused("ranks 0 and 1 are both on GPU-5f1c", setting="cuda")
refused("rank 0 computes on a GPU, and rank 1 on", driver=rank == 0)
refused("run.device is 'cuda' but torch sees no GPU", setting="cuda", driver=rank == 0)
refused("local rank 1 has no GPU of its own", gpus=0 if rank else 2)
world = launch.start("auto", timeout=60, threads=1)
total = torch.tensor([float(world.rank + 1)])
torch.distributed.all_reduce(total)
print(world.rank, world.size, world.local_rank, world.local_size, world.device.kind, int(total))
launch.stop()
"""
"""One rank: meet; be refused a GPU that both see, one beside a CPU, one that the other does not have; add up ranks on a
CPU, leave."""


def test_two_tasks_of_srun():
    """Slurm's variables, none of another launcher, and a meeting point that the sbatch script exports."""
    launchers = ("SLURM_", "MASTER_", "LOCAL_", "RANK", "WORLD_SIZE")
    inherited = {name: value for name, value in environment().items() if not name.startswith(launchers)}
    inherited |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": ""}
    inherited |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    tasks = [
        subprocess.Popen(
            command("-c", RANK), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**inherited, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank, task in enumerate(tasks):
            output, errors = task.communicate(timeout=90)
            assert task.returncode == 0, errors
            assert output.split() == ["refused"] * 4 + [str(rank), "2", str(rank), "2", "cpu", "3"]
    finally:
        for task in tasks:
            task.kill()
            task.wait()
