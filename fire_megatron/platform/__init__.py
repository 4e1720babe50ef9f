"""The device seam: CUDA + NCCL or CPU + gloo, process start-up, and detection of fused kernels."""

from fire_megatron.platform.capabilities import Capability, capability_report, detect_capabilities
from fire_megatron.platform.device import (
    Device,
    DeviceMemory,
    GpuIdentity,
    choose_attention_kernels,
    compute_device,
    device_kind,
    device_memory,
    gpu_identity,
    host_copy,
    peak_memory_mb,
    release_cached_memory,
    reset_peak_memory,
    select_device,
    synchronize,
)
from fire_megatron.platform.graphs import Graphs
from fire_megatron.platform.host import HostMemory, upload
from fire_megatron.platform.launch import World, simulate, start, stop
from fire_megatron.platform.offload import Offload
from fire_megatron.platform.rng import get_rng_state, seed_everything, set_rng_state
from fire_megatron.platform.watch import Watch, tick

__all__ = [
    "Capability",
    "Device",
    "DeviceMemory",
    "GpuIdentity",
    "Graphs",
    "HostMemory",
    "Offload",
    "Watch",
    "World",
    "capability_report",
    "choose_attention_kernels",
    "compute_device",
    "detect_capabilities",
    "device_kind",
    "device_memory",
    "get_rng_state",
    "gpu_identity",
    "host_copy",
    "peak_memory_mb",
    "release_cached_memory",
    "reset_peak_memory",
    "seed_everything",
    "select_device",
    "set_rng_state",
    "simulate",
    "start",
    "stop",
    "synchronize",
    "tick",
    "upload",
]
