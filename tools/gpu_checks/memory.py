"""Memory besides models: weights that wait on the host, and what communicators take."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from fire_megatron.platform.device import device_memory, release_cached_memory, synchronize
from fire_megatron.platform.offload import Offload
from gpu_checks.check import Context, Findings, rounded, said
from gpu_checks.models import Here, alone, parameter_bytes

_ROUNDS = 3


def offload(context: Context) -> Findings:
    """A model's weights leave the device and come back, while others use the memory in pieces of odd sizes."""
    with alone(context) as here:
        model = here.model("Qwen3-1.7B" if context.gpu else "toy")
        kept = [parameter.detach().clone() for parameter in model.parameters()]
        size, problems, spent = parameter_bytes(model), [], {True: [], False: []}
        before = _in_use(here)
        for constant in (False, True):
            away = Offload(model.parameters, constant=constant)
            for number in range(_ROUNDS):
                spent[constant].append(_round(here, away))
                same = all(torch.equal(a, b) for a, b in zip(model.parameters(), kept, strict=True))
                if not same:
                    problems.append(f"round {number + 1}: weights are not what they were")
        after = _in_use(here)
    figures = {
        "weights_gb": rounded(size / 1e9),
        "equal_after_each_return": not problems,
        "first_leave_s": rounded(spent[False][0][0]),
        "to_host_gb_s": rounded(size / min(leave for leave, _ in spent[False][1:]) / 1e9),
        "from_host_gb_s": rounded(size / min(back for _, back in spent[True][1:]) / 1e9),
        "allocated_growth_mb": None if before is None else round((after[0] - before[0]) / 2**20),
        "reserved_growth_mb": None if before is None else round((after[1] - before[1]) / 2**20),
    }
    if figures["allocated_growth_mb"]:
        problems.append(f"{figures['allocated_growth_mb']} MB more are allocated than before")
    told = (
        f"{figures['weights_gb']} GB bit by bit the same after {2 * _ROUNDS} returns; {figures['to_host_gb_s']} GB/s "
        f"away ({figures['first_leave_s']} s the first time), {figures['from_host_gb_s']} back; allocator's growth "
        f"{said(figures['reserved_growth_mb'], 'MB')}"
    )
    return Findings(told, figures, problems)


def _round(here: Here, away: Offload) -> tuple[float, float]:
    """Seconds to leave and to come back, with tensors of others in between."""
    leave = _timed(here, away.leave)
    device, unit = here.world.device.torch_device, 2**20 if here.context.gpu else 2**10
    others = [torch.empty(unit * (37 + 11 * i), dtype=torch.uint8, device=device) for i in range(40)]
    del others[::2]  # holes
    del others
    return leave, _timed(here, away.come_back)


def _timed(here: Here, action: Callable[[], None]) -> float:
    synchronize(here.world.device)
    started = time.perf_counter()
    action()
    synchronize(here.world.device)
    return time.perf_counter() - started


def _in_use(here: Here) -> tuple[int, int] | None:
    """Allocated and reserved bytes; None on a CPU."""
    memory = device_memory(here.world.device)
    return None if memory is None else (memory.allocated, memory.reserved)


def communicators(context: Context) -> Findings:
    """What NCCL takes of the GPU for a group: of one rank, which has no peers to keep buffers for."""
    with alone(context) as here:
        device = here.world.device
        tensor = torch.ones(2**20, device=device.torch_device)

        def used() -> int:
            release_cached_memory(device)
            synchronize(device)
            memory = device_memory(device)
            assert memory is not None
            return memory.used

        points = [used()]
        for _ in range(3):
            group = dist.new_group([0], backend=device.backend)
            points.append(used())
            dist.all_reduce(tensor, group=group)
            points.append(used())
    steps = [round((b - a) / 2**20, 1) for a, b in itertools.pairwise(points)]
    names = ("made", "used")
    figures = {f"group_{i // 2 + 1}_{names[i % 2]}_mb": step for i, step in enumerate(steps)}
    told = "; ".join(
        f"group {i + 1}: {steps[2 * i]} MB when made, {steps[2 * i + 1]} when first used" for i in range(3)
    )
    return Findings(told, figures)
