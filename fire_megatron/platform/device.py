"""Which device a process computes on, and the facts about it that the layers above may ask for.

This package is the only one that touches ``torch.cuda``.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fire_megatron.config.errors import LayoutError
from fire_megatron.platform import cpu_seam

_ONE_EACH = (
    "start as many processes a node as it has GPUs (torchrun --nproc-per-node, srun --ntasks-per-node), with all of "
    "them visible to each or one bound to each (srun --gpus-per-task=1), or set run.device=cpu"
)


@dataclass(frozen=True)
class Device:
    """A process's compute device and the collective backend that serves it."""

    kind: str
    """``cuda`` or ``cpu``."""
    index: int = 0
    """Local device index; 0 on CPU."""

    @property
    def torch_device(self) -> torch.device:
        """The device on which this process's tensors live."""
        return torch.device("cuda", self.index) if self.is_cuda else torch.device("cpu")

    @property
    def is_cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.kind == "cuda"

    @property
    def backend(self) -> str:
        """The torch.distributed backend for this device."""
        return "nccl" if self.is_cuda else "gloo"

    def describe(self) -> str:
        """One line for the start-up report."""
        if not self.is_cuda:
            return f"cpu (gloo, {torch.get_num_threads()} threads a rank)"
        properties = torch.cuda.get_device_properties(self.index)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB (nccl)"


def select_device(setting: str, *, local_rank: int = 0) -> Device:
    """Pick the device named by ``run.device``.

    Args:
        setting: ``auto`` (a GPU when there is one), ``cuda`` or ``cpu``.
        local_rank: index of this process on its node, which is its GPU's index where it sees all GPUs of the node.

    Raises:
        LayoutError: ``cuda`` is asked for and there is no GPU for this process.
    """
    if setting == "cpu" or (setting == "auto" and not torch.cuda.is_available()):
        return Device("cpu")
    if not torch.cuda.is_available():
        raise LayoutError("run.device is 'cuda' but torch sees no GPU; set run.device=cpu, or fix the driver")
    seen = torch.cuda.device_count()
    # A single one may be bound to this process (srun --gpus-per-task=1); own_gpu() finds out whether it is.
    index = 0 if seen == 1 else local_rank
    if index >= seen:
        raise LayoutError(
            f"run.device: local rank {local_rank} has no GPU of its own ({seen} on this node); {_ONE_EACH}"
        )
    torch.cuda.set_device(index)
    return Device("cuda", index)


def same_kind(device: Device, rank: int, store: dist.Store) -> str | None:
    """What is wrong where another rank computes on a device of another kind, as on a node whose driver does not answer;
    None otherwise.

    Args:
        device: of this process.
        rank: of the world.
        store: where all ranks register their devices.
    """
    host = socket.gethostname()
    first = json.loads(store.compare_set("fire/kind", "", json.dumps([device.kind, rank, host])))
    if first[0] == device.kind:
        return None
    (_, cpu_rank, cpu_host), (_, gpu_rank, _) = sorted([first, [device.kind, rank, host]])
    return (
        f"run.device: rank {gpu_rank} computes on a GPU, and rank {cpu_rank} on {cpu_host} on a CPU, since torch sees "
        "no GPU there; fix the driver of that node or leave it out, or set run.device=cpu"
    )


def own_gpu(device: Device, rank: int, store: dist.Store) -> str | None:
    """What is wrong where another rank computes on this rank's GPU, which NCCL does not carry; None otherwise.

    Args:
        device: of this process.
        rank: of the world.
        store: where all ranks register their GPUs.
    """
    identity = gpu_identity(device)
    if identity is None or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE", "0") != "0":
        return None
    if not identity.names and identity.bus_id is None:
        return None
    name = identity.names[0] if identity.names else f"{socket.gethostname()} {identity.bus_id}"
    holder = int(store.compare_set(f"fire/gpu/{name}", "", str(rank)))
    if holder == rank:
        return None
    return (
        f"run.device: ranks {min(holder, rank)} and {max(holder, rank)} are both on {name} of {socket.gethostname()}, "
        f"and NCCL needs one GPU a rank; {_ONE_EACH}"
    )


def choose_attention_kernels(device: Device) -> None:
    """Keep cuDNN out of ``scaled_dot_product_attention``: on Hopper torch takes it first, and it makes a plan for every
    new shape, in tens to hundreds of milliseconds, of which a rollout has many. What is left (flash attention, the
    memory-efficient kernel, plain products) makes none. Transformer Engine's attention asks cuDNN itself, for packs."""
    if device.is_cuda:
        torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True)
class GpuIdentity:
    """How NVML may be asked for a GPU, of which it counts all, also those that this process does not see."""

    names: tuple[str, ...]
    """Its UUID, or that of its MIG instance, in each form that it may have; the likeliest first."""
    bus_id: str | None
    """Its place on the PCI bus, as ``00000000:17:00.0``; None where torch does not tell."""


def gpu_identity(device: Device) -> GpuIdentity | None:
    """Which GPU of the node a process computes on, whatever CUDA_VISIBLE_DEVICES says; None on a CPU."""
    if not device.is_cuda:
        return None
    properties = torch.cuda.get_device_properties(device.index)
    names = []
    # Of a MIG instance CUDA may tell the UUID of the whole GPU. It makes one instance visible, named here.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if device.index < len(visible) and visible[device.index].strip().startswith("MIG-"):
        names.append(visible[device.index].strip())
    uuid = getattr(properties, "uuid", None)
    if uuid is not None:
        names += [f"GPU-{uuid}", f"MIG-{uuid}"]
    place = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    bus_id = None if None in place else "{:08X}:{:02X}:{:02X}.0".format(*place)
    return GpuIdentity(tuple(names), bus_id)


def peak_memory_mb(device: Device) -> float:
    """Peak memory of this process in MiB: allocated GPU memory, or resident memory on CPU."""
    if device.is_cuda:
        return torch.cuda.max_memory_allocated(device.index) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a GPU's memory, now."""

    allocated: int
    """In this process's tensors."""
    reserved: int
    """Held by its allocator, for them and for tensors to come."""
    used: int
    """Of the whole GPU, by all processes: contexts, communicators and libraries among it."""


def device_memory(device: Device) -> DeviceMemory | None:
    """What is in use on a GPU; None on a CPU, where processes share memory with everything else."""
    if not device.is_cuda:
        return None
    free, total = torch.cuda.mem_get_info(device.index)
    index = device.index
    return DeviceMemory(torch.cuda.memory_allocated(index), torch.cuda.memory_reserved(index), total - free)


def release_cached_memory(device: Device) -> None:
    """Give memory that the allocator holds for tensors to come back to the GPU."""
    if device.is_cuda:
        torch.cuda.empty_cache()


def reset_peak_memory(device: Device) -> None:
    """Restart the peak of allocated GPU memory; that of resident memory on a CPU covers the whole process."""
    if device.is_cuda:
        torch.cuda.reset_peak_memory_stats(device.index)


def compute_device() -> torch.device:
    """The device on which this process builds its models: its GPU, or what the seam has put in its place."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else cpu_seam.target()


def device_kind(device: torch.device) -> str:
    """``cpu`` or ``cuda``, by which sizes and formats are chosen; of a simulated device, what it simulates."""
    return cpu_seam.kind() if device.type == "meta" else device.type


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in (pageable) host memory, which shares nothing with the tensor."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def synchronize(device: Device) -> None:
    """Wait for the device, so that a clock read afterwards covers the work issued before."""
    if device.is_cuda:
        torch.cuda.synchronize(device.index)
