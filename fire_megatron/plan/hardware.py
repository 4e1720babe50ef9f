"""What GPUs have, from their makers' data sheets, and what of it a run can be expected to get."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU in a node of eight with NVLink, and its share of the network."""

    name: str
    memory_gib: float
    """As CUDA reports it."""
    bf16_tflops: float
    """Dense."""
    fp8_tflops: float | None
    """Dense; None where there is no FP8."""
    fp32_tflops: float
    """Without TF32."""
    memory_gb_s: float
    nvlink_gb_s: float
    """In one direction."""
    network_gb_s: float
    """In one direction, of a GPU's own adapter."""
    mxfp8: bool = False
    """Whether it multiplies blocks of 32 with a scale each."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", 39.4, 312, None, 19.5, 1555, 300, 25),
        Gpu("a100-80", 79.2, 312, None, 19.5, 2039, 300, 25),
        Gpu("h100", 79.1, 989, 1979, 67, 3350, 450, 50),
        Gpu("h200", 139.8, 989, 1979, 67, 4800, 450, 50),
        Gpu("b200", 178.3, 2250, 4500, 80, 8000, 900, 50, mxfp8=True),
    )
}
"""By name. Sources: NVIDIA's data sheets of A100, H100, H200 and HGX B200 (SXM), DGX systems' network."""

CONTEXT_GIB = 1.25
"""CUDA's context and the libraries' workspaces."""
COMMUNICATOR_GIB = 0.4
"""NCCL's buffers of a group of ranks that has communicated; an H200's group of one rank takes 0.38."""
FRAGMENTATION = 0.05
"""Of what comes and goes, memory that the allocator holds and cannot use."""
PRODUCTS = 0.38
"""Of the peak FLOP/s, what matrix products and attention of training and scoring reach: measured on an H200."""
BANDWIDTH = 0.7
"""Of the memory's and the links' bandwidth, what is reached."""
LAUNCH_S = 9e-6
"""Seconds to launch a kernel from Python; what is shorter on the GPU waits for it."""
GRAPH_LAUNCH_S = 2.1e-6
"""Seconds that each operator of a CUDA graph adds to the reading of weights and cache: measured on an H200."""
LOOK_S = 5e-4
"""Seconds that decoding stands still when the host looks at what was sampled: a wait for the device, a copy, Python."""
LATENCY_S = {"node": 10e-6, "network": 20e-6}
"""Seconds of a collective besides its bytes."""
HOST_GB_S = 54.0
"""Between a GPU and pinned host memory, while no other GPU copies."""
HOST_NODE_GB_S = 240.0
"""Of a node's host memory, which its GPUs share."""


def host_gb_s(gpus_per_node: int) -> float:
    """Between each GPU and pinned host memory while all GPUs of the node copy: roles come and go together."""
    return min(HOST_GB_S, HOST_NODE_GB_S / gpus_per_node)
