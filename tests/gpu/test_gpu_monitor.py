"""The GPU sampler on a real GPU: NVML finds the one that torch computes on, and tells plausible things of it."""

from __future__ import annotations

import importlib.util
import json
import os
import threading
import time
from pathlib import Path

import pytest
from processes import call, environment

from fire_megatron.metrics.gpu_sampler import GpuSampler, find_gpu
from fire_megatron.platform.capabilities import capability_report
from fire_megatron.platform.device import compute_device, gpu_identity, select_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("pynvml") is None, reason="nvidia-ml-py is not installed"),
]


def memory_of_the_found_gpu(device):
    """MiB in use of the GPU that the device's identity leads to; and those in use when 2 GiB more are taken."""
    import pynvml
    import torch

    gpu = gpu_identity(device)
    torch.zeros(1, device=device.torch_device)
    pynvml.nvmlInit()
    handle = find_gpu(pynvml, gpu)
    assert handle is not None, gpu
    before = pynvml.nvmlDeviceGetMemoryInfo(handle).used
    taken = torch.zeros(2**31, dtype=torch.uint8, device=device.torch_device)
    after = pynvml.nvmlDeviceGetMemoryInfo(handle).used
    assert taken[0] == 0
    pynvml.nvmlShutdown()
    return (before / 2**20, after / 2**20)


def test_the_gpu_is_the_one_that_torch_computes_on():
    before, after = memory_of_the_found_gpu(select_device("cuda"))
    assert after - before >= 2000


def test_also_where_others_are_hidden():
    """Under CUDA_VISIBLE_DEVICES torch's index 0 is the node's last GPU."""
    import torch

    last = torch.cuda.device_count() - 1
    code = (
        "import json, test_gpu_monitor as t; from fire_megatron.platform.device import select_device;"
        "print(json.dumps(t.memory_of_the_found_gpu(select_device('cuda'))))"
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[-1] or str(last)
    told = call("-c", code, env=environment(Path(__file__).parent, CUDA_VISIBLE_DEVICES=visible))
    before, after = json.loads(told.splitlines()[-1])
    assert after - before >= 2000


def test_readings_of_a_busy_gpu():
    import torch

    device = select_device("cuda")
    a = torch.randn(4096, 4096, device=compute_device(), dtype=torch.bfloat16)
    with GpuSampler(gpu_identity(device), interval=0.1) as sampler:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            for _ in range(20):
                a @ a
            torch.cuda.synchronize()
        values = {key: value.result for key, value in sampler.values().items()}
    assert not [thread for thread in threading.enumerate() if thread.name == "GPU sampler"]
    print(json.dumps(values, indent=1))
    assert values["gpu/memory_used_mb"] > 100
    plausible = {
        "gpu/utilization": (20, 100),
        "gpu/power_w": (10, 2000),
        "gpu/energy_j": (10, 10_000),
        "gpu/temperature_c": (10, 110),
        "gpu/sm_clock_mhz": (100, 4000),
        "gpu/throttled": (0, 1),
        "gpu/ecc_uncorrected": (0, 0),
    }
    for key, (low, high) in plausible.items():
        if key in values:  # MIG and some cards tell less
            assert low <= values[key] <= high, key


def test_the_report_says_that_nvml_answers():
    line = capability_report(select_device("cuda")).splitlines()[-1]
    assert line.startswith("nvidia-ml-py") and "gpu/... metrics, unless" in line
