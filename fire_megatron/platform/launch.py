"""Process start-up under torchrun, srun or a plain ``python``: the only reader of launcher variables."""

from __future__ import annotations

import datetime
import logging
import os
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fire_megatron.config.errors import LayoutError
from fire_megatron.platform import cpu_seam
from fire_megatron.platform.device import Device, select_device


@dataclass(frozen=True)
class World:
    """This process's place in the run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: Device

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes the run's files."""
        return self.rank == 0


def _variable(*names: str, default: int) -> int:
    """The first of these environment variables that is set, as an integer."""
    for name in names:
        value = os.environ.get(name)
        if value is not None:
            try:
                return int(value)
            except ValueError:
                raise LayoutError(f"environment variable {name}={value!r} is not a whole number") from None
    return default


def launched_world_size() -> int:
    """World size the launcher announces, before any process group exists."""
    return _variable("WORLD_SIZE", "SLURM_NTASKS", default=1)


def launched_rank() -> int:
    """Global rank the launcher announces."""
    return _variable("RANK", "SLURM_PROCID", default=0)


def _quiet_third_parties() -> None:
    """Keep import-time chatter of optional dependencies off the console; our report says what is missing."""
    for pattern in (".*absl.logging.*", ".*Apex is not installed.*", ".*Transformer Engine.*", ".*[Gg]rouped.*gemm.*"):
        warnings.filterwarnings("ignore", message=pattern)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron.*")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)


def _set_threads(threads: int, local_size: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // local_size))


def start(device: str = "auto", *, timeout: float = 600.0, threads: int = 0) -> World:
    """Join the run: pick the device, install the CPU seam where needed, open the default process group.

    Works under torchrun, under ``srun`` with MASTER_ADDR set, and as a single plain process.

    Args:
        device: ``auto``, ``cpu`` or ``cuda`` (``run.device``).
        timeout: seconds after which a stalled collective ends the run (``run.collective_timeout``).
        threads: CPU threads a rank; 0 shares the node's cores among its ranks.

    Raises:
        LayoutError: the launcher's variables or the device setting make no sense.
    """
    _quiet_third_parties()
    rank, size = launched_rank(), launched_world_size()
    local_rank = _variable("LOCAL_RANK", "SLURM_LOCALID", default=0)
    local_size = _variable("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", default=1)
    chosen = select_device(device, local_rank=local_rank)
    if not chosen.is_cuda:
        _set_threads(threads, local_size)
        cpu_seam.install()
    if not dist.is_initialized():
        patience = datetime.timedelta(seconds=timeout)
        if size == 1 and "MASTER_ADDR" not in os.environ:
            dist.init_process_group(chosen.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=patience)
        else:
            dist.init_process_group(chosen.backend, rank=rank, world_size=size, timeout=patience)
    return World(rank, size, local_rank, local_size, chosen)


def stop() -> None:
    """Leave the run; a no-op when it was never joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
