"""Clocks, and what the card itself can do: what other figures are shares of."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import torch

from fire_megatron.platform.device import Device, synchronize

_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
_GRAPHS = ("cudaGraphLaunch", "cuGraphLaunch")
_WAITS = (
    "cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cuStreamSynchronize",
    "cuCtxSynchronize", "cudaMemcpy",
)  # fmt: skip


def seconds(function: Callable[[], object], device: Device, *, times: int = 3, first: bool = False) -> float:
    """The best of so many calls, each with all that it has issued; ``first``: there is no call before they count."""
    spent = []
    for number in range(times + (not first)):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        if number or first:
            spent.append(time.perf_counter() - started)
    return min(spent)


def copy_gb_s(device: Device, size: int | None = None) -> float:
    """Bytes read and written a second by a copy on the device, in GB/s. Args: size: bytes that are copied."""
    size = size or (2**31 if device.is_cuda else 2**24)
    source = torch.zeros(size, dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device) / 1e9


def product_tflops(
    device: Device, shape: tuple[int, int, int], dtype: torch.dtype, out_dtype: torch.dtype | None = None
) -> float:
    """Of ``[m, k] @ [k, n]``. Args: shape: m, n, k; out_dtype: of the result, where it is another."""
    m, n, k = shape
    left = torch.randn(m, k, device=device.torch_device, dtype=dtype)
    right = torch.randn(n, k, device=device.torch_device, dtype=dtype).t()
    options = {} if out_dtype is None else {"out_dtype": out_dtype}
    return 2 * m * n * k / seconds(lambda: torch.mm(left, right, **options), device) / 1e12


def peak_tflops(device: Device) -> float:
    """The best that large bfloat16 products reach here."""
    sizes = (8192, 4096) if device.is_cuda else (256,)
    return max(product_tflops(device, (size, size, size), torch.bfloat16) for size in sizes)


def events(function: Callable[[], object], device: Device) -> Counter[str]:
    """How often the profiler saw what, by name."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        function()
        synchronize(device)
    return Counter({event.key: event.count for event in profile.key_averages()})


def host_work(counts: Counter[str]) -> dict[str, int]:
    """What the host has done: kernels and graphs launched, waits for the device, copies to the host, operators."""
    return {
        "launches": sum(counts[name] for name in _LAUNCHES),
        "graphs": sum(counts[name] for name in _GRAPHS),
        "waits": sum(counts[name] for name in _WAITS),
        "copies_to_host": sum(count for name, count in counts.items() if name.startswith("Memcpy DtoH")),
        "operators": sum(count for name, count in counts.items() if name.startswith("aten::")),
    }
