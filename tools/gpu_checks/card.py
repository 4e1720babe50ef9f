"""The card: what it can do, by which the other figures are judged."""

from __future__ import annotations

import contextlib
import time

import torch

from fire_megatron.platform.device import Device, device_memory, synchronize
from gpu_checks import measure
from gpu_checks.check import Context, Findings, rounded
from gpu_checks.models import alone


def card(context: Context) -> Findings:
    """Products, memory, host copies, launches."""
    with alone(context) as here:
        return _measured(here.world.device, context)


def _measured(device: Device, context: Context) -> Findings:
    name = device.describe().partition(" (")[0]
    figures = {
        "card": name,
        "driver": _driver() if context.gpu else None,
        "bf16_tflops": rounded(measure.peak_tflops(device)),
        "bf16_to_float32_tflops": rounded(_to_float32(device)),
        "float32_tflops": rounded(
            measure.product_tflops(device, (4096,) * 3 if context.gpu else (256,) * 3, torch.float)
        ),
        "copy_gb_s": rounded(measure.copy_gb_s(device)),
        **_host_copies(device),
        **_host_costs(device),
    }
    memory = device_memory(device)
    figures["context_mb"] = None if memory is None else round((memory.used - memory.reserved) / 2**20)
    pinned = f"{figures['to_host_gb_s']}/{figures['from_host_gb_s']} GB/s to/from pinned memory"
    told = (
        f"{name}; bf16 {figures['bf16_tflops']} TFLOP/s, float32 results {figures['bf16_to_float32_tflops']}; "
        f"copy {figures['copy_gb_s']} GB/s; {pinned}; {figures['launch_us']} us a launch, "
        f"{figures['round_trip_us']} us a wait"
    )
    return Findings(told, figures)


def _driver() -> str | None:
    with contextlib.suppress(Exception):  # nvidia-ml-py is a convenience here
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else version
    return None


def _to_float32(device: Device) -> float | None:
    """Of logits: bfloat16 products that leave in float32; None where torch has none."""
    shape = (2048, 65536, 2560) if device.is_cuda else (64, 256, 64)
    with contextlib.suppress(RuntimeError, TypeError, NotImplementedError):
        return measure.product_tflops(device, shape, torch.bfloat16, torch.float32)
    return None


def _host_copies(device: Device) -> dict[str, float | None]:
    size = 2**30 if device.is_cuda else 2**22
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.is_cuda)
    there = torch.zeros(size, dtype=torch.uint8, device=device.torch_device)
    return {
        "to_host_gb_s": rounded(size / measure.seconds(lambda: host.copy_(there, non_blocking=True), device) / 1e9),
        "from_host_gb_s": rounded(size / measure.seconds(lambda: there.copy_(host, non_blocking=True), device) / 1e9),
    }


def _host_costs(device: Device) -> dict[str, float | None]:
    """Microseconds to issue a small operator, and to issue one and wait for its result."""
    number, count = torch.zeros((), device=device.torch_device), 2000

    def issue() -> float:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(count):
            number.add_(1)
        return time.perf_counter() - started  # not waiting: the host's part alone

    def wait() -> float:
        started = time.perf_counter()
        for _ in range(count // 10):
            number.add_(1).item()
        return 10 * (time.perf_counter() - started)

    issue(), wait()
    return {
        "launch_us": rounded(min(issue() for _ in range(3)) / count * 1e6),
        "round_trip_us": rounded(min(wait() for _ in range(3)) / count * 1e6),
    }
