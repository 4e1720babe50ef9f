"""Which device a process takes, on machines with and without GPUs; torch is told how many there are."""

from __future__ import annotations

import mmap
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import call

from fire_megatron.config.errors import LayoutError
from fire_megatron.platform.device import (
    Device,
    DeviceMemory,
    GpuIdentity,
    choose_attention_kernels,
    compute_device,
    device_memory,
    gpu_identity,
    own_gpu,
    peak_memory_mb,
    release_cached_memory,
    select_device,
    synchronize,
)


@pytest.fixture
def machine(monkeypatch):
    """``machine(gpus)`` makes it one with so many; returns the list of devices that are taken."""

    def make(gpus):
        taken = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        return taken

    return make


@pytest.mark.parametrize(
    ("gpus", "setting", "local_rank", "chosen"),  # of the GPUs that this process sees
    [
        (0, "auto", 0, Device("cpu")),
        (0, "auto", 3, Device("cpu")),
        (0, "cpu", 0, Device("cpu")),
        (2, "cpu", 1, Device("cpu")),
        (2, "cpu", 5, Device("cpu")),  # more processes than GPUs matter to nobody here
        (2, "auto", 1, Device("cuda", 1)),
        (2, "cuda", 0, Device("cuda", 0)),
        (1, "auto", 3, Device("cuda", 0)),  # bound to it: srun --gpus-per-task=1
    ],
)
def test_selection(gpus, setting, local_rank, chosen, machine):
    taken = machine(gpus)
    assert select_device(setting, local_rank=local_rank) == chosen
    assert taken == ([chosen.index] if chosen.is_cuda else []), "CUDA is not touched without need"


@pytest.mark.parametrize(("device", "said"), [(Device("cuda", 1), [False]), (Device("cpu"), [])])
def test_attention_leaves_cudnn_out(device, said, monkeypatch):
    switched = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", switched.append)
    choose_attention_kernels(device)
    assert switched == said


def test_cuda_where_there_is_none(machine):
    machine(0)
    with pytest.raises(LayoutError, match="run.device is 'cuda' but torch sees no GPU; set run.device=cpu"):
        select_device("cuda")


@pytest.mark.parametrize("setting", ["auto", "cuda"])
def test_more_processes_than_gpus(setting, machine):
    """Two ranks on one GPU would hang in NCCL."""
    taken = machine(2)
    with pytest.raises(LayoutError, match=r"local rank 2 has no GPU of its own \(2 on this node\)"):
        select_device(setting, local_rank=2)
    assert not taken


@pytest.fixture
def second(monkeypatch):
    """``second(**properties)``: what is said to rank 3, after rank 1 has registered GPU-5f1c; torch tells the
    properties."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    told = {}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**told))

    def register(first=None, **properties):
        store = dist.HashStore()
        for rank, mine in ((1, first or {"uuid": "5f1c"}), (3, properties)):
            told.clear()
            told.update(mine)
            problem = own_gpu(Device("cuda"), rank, store)
        return problem

    return register


def test_two_ranks_on_one_gpu(second, monkeypatch):
    """Ranks, GPU and fix are named; no launcher's variables are needed to tell a GPU that is bound to its process."""
    problem = second(uuid="5f1c")
    assert "ranks 1 and 3 are both on GPU-5f1c" in problem and "--gpus-per-task=1" in problem
    place = {"pci_domain_id": 0, "pci_bus_id": 0x17, "pci_device_id": 0}
    assert "ranks 1 and 3 are both on" in second(first=place, **place), "a torch that tells no UUID"
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert second(uuid="5f1c") is None, "NCCL was told to carry it"


def test_a_gpu_of_its_own(second, monkeypatch):
    assert second(uuid="77aa") is None
    assert second() is None, "nothing is known of it"
    assert own_gpu(Device("cpu"), 0, dist.HashStore()) is None
    store = dist.HashStore()
    for rank in range(2):  # instances of one GPU, of which CUDA may tell the whole GPU's UUID
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"MIG-{rank}")
        assert own_gpu(Device("cuda"), rank, store) is None


def test_what_a_device_is_to_torch():
    cpu, cuda = Device("cpu"), Device("cuda", 3)
    assert (cpu.torch_device, cpu.backend, cpu.is_cuda) == (torch.device("cpu"), "gloo", False)
    assert (cuda.torch_device, cuda.backend, cuda.is_cuda) == (torch.device("cuda:3"), "nccl", True)
    assert cpu.describe() == f"cpu (gloo, {torch.get_num_threads()} threads a rank)"


def test_compute_device_without_a_gpu(machine):
    machine(0)
    assert compute_device() == torch.device("cpu")
    synchronize(Device("cpu"))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="compares with Linux' own count")
def test_peak_memory_of_a_cpu_process_is_in_mebibytes():
    """It rises by what is allocated and used, and does not fall."""
    before = peak_memory_mb(Device("cpu"))
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    assert now - 1 <= before < now + 100_000
    rise = 64
    # Fresh pages past the peak of earlier tests: an allocator might hand out ones that count already.
    size = int(before - now) + rise
    with mmap.mmap(-1, size << 20) as block:
        for _ in range(size):
            block.write(bytes(2**20))
        peak = peak_memory_mb(Device("cpu"))
    assert before + rise / 2 < peak < before + 2 * rise
    assert peak_memory_mb(Device("cpu")) >= peak


def test_the_cpu_on_a_machine_with_gpus():
    """In a process of its own: the seam stays."""
    code = (
        "import torch; torch.cuda.is_available = lambda: True; torch.cuda.device_count = lambda: 1\n"
        "from fire_megatron.platform import device, launch\n"
        "world = launch.start('cpu')\n"
        "assert device.compute_device() == torch.device('cpu') == world.device.torch_device\n"
        "launch.stop()\n"
    )
    call("-c", code)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ("GPU-5f1c", "MIG-5f1c")),
        ("3,5", ("GPU-5f1c", "MIG-5f1c")),
        ("MIG-77aa", ("GPU-5f1c", "MIG-5f1c")),  # there is no second one
        ("0, MIG-77aa", ("MIG-77aa", "GPU-5f1c", "MIG-5f1c")),
    ],
)
def test_what_nvml_knows_a_gpu_by(visible, names, monkeypatch):
    properties = SimpleNamespace(uuid="5f1c", pci_domain_id=0, pci_bus_id=0x17, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {1: properties, 0: SimpleNamespace()}.__getitem__)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_identity(Device("cuda", 1)) == GpuIdentity(names, "00000000:17:00.0")
    assert gpu_identity(Device("cpu")) is None


def test_a_torch_that_does_not_tell(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_identity(Device("cuda")) == GpuIdentity((), None)


def test_memory_in_use_on_a_gpu_and_on_a_cpu(monkeypatch):
    """Asked of the device's own index; on a CPU CUDA is not asked at all."""
    assert device_memory(Device("cpu")) is None
    release_cached_memory(Device("cpu"))
    released = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (30 + index, 80))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index: 10 + index)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 20 + index)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: released.append(True))
    assert device_memory(Device("cuda", 3)) == DeviceMemory(allocated=13, reserved=23, used=47)
    release_cached_memory(Device("cuda", 3))
    assert released == [True]
