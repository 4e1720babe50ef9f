"""Lets megatron-core, which addresses ``cuda`` by name, run unchanged on CPU tensors.

megatron-core asks for ``torch.cuda.current_device()``, allocates with ``device='cuda'``, and its optimizer
compares ``param.type()`` with ``'torch.cuda.FloatTensor'``. In a process that computes on CPU each of these
means "the compute device", so here they are answered with the CPU. Nothing is emulated: the same modules,
schedules and collectives run, on gloo. A plan (``fire_megatron/plan``) has the meta device in the CPU's place, on which
tensors have shapes and no memory. Factories are wrapped one by one rather than by a TorchFunctionMode,
which would add Python overhead to every single torch call of the decode loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

_FACTORIES = (
    "arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like",
    "rand", "randint", "randn", "tensor", "zeros", "zeros_like",
)  # fmt: skip
_installed = False
_target = torch.device("cpu")
"""What stands for ``cuda``."""
_kind = "cpu"
"""Kind of device whose place the meta device takes."""


class _Stream:
    """Stands for the only order there is on a CPU: program order."""

    cuda_stream = 0

    def wait_stream(self, other: object) -> None:
        """Everything issued before has finished."""

    def wait_event(self, event: object) -> None:
        """Everything recorded before has finished."""

    def record_event(self, event: object = None) -> _Stream:
        """Nothing to record; what comes back can be waited for."""
        return self

    def synchronize(self) -> None:
        """Nothing is outstanding."""

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def target() -> torch.device:
    """The device that stands for ``cuda``."""
    return _target


def standing_in() -> tuple[str, str]:
    """What :func:`install` was last told: device and kind."""
    return _target.type, _kind


def kind() -> str:
    """``cpu`` or ``cuda``: the kind of device that the meta device stands for."""
    return _kind


def _on_target(device: Any) -> Any:
    """Map any spelling of a CUDA device to the one in its place and leave everything else alone."""
    if isinstance(device, torch.device):
        return _target if device.type == "cuda" else device
    if isinstance(device, str) and device.startswith("cuda"):
        return _target
    return device


def _wrap_factory(function: Callable) -> Callable:
    @functools.wraps(function)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _on_target(kwargs["device"])
        return function(*args, **kwargs)

    return factory


def _wrap_to(function: Callable) -> Callable:
    @functools.wraps(function)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _on_target(kwargs["device"])
        return function(self, *(_on_target(a) for a in args), **kwargs)

    return to


def _wrap_type(function: Callable) -> Callable:
    @functools.wraps(function)
    def tensor_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return "torch.cuda." + function(self).rpartition(".")[2]
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return function(self, dtype, *args, **kwargs)

    return tensor_type


def _cpu_rng_state(device: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_cpu_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.default_generator.set_state(state)


def _patch_megatron_rng() -> None:
    """megatron's RNG tracker must fork the generator that CPU kernels draw from."""
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = _cpu_rng_state
    megatron_random._set_cuda_rng_state = _set_cpu_rng_state


def _patch_megatron_optimizer() -> None:
    """Where Transformer Engine or apex is installed, megatron's optimizer takes their CUDA kernels at import, whatever
    the device; give it what it takes where neither is installed."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as base

    optimizer.Adam, optimizer.SGD, optimizer.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, torch.optim.SGD, True
    distrib_optimizer.Adam = torch.optim.Adam
    distrib_optimizer.HAVE_APEX_OR_TE = False
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False
    for module in (base, clip_grads):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_tensor_impl = None


def _patch_megatron_experts(stream: _Stream) -> None:
    """megatron's token dispatcher copies the numbers of tokens to the host on a stream of its own, where they become
    numpy arrays, which is what the all-to-all takes; on a CPU they are there already."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if not torch.is_tensor(tensor):
            return tensor
        tensor = tensor.cpu()  # no-op, except in a plan
        return tensor.numpy() if as_numpy else tensor

    moe_utils.te_general_gemm = (
        None  # else the router multiplies with Transformer Engine's kernel, where it is installed
    )
    token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = stream
    token_dispatcher.maybe_move_tensor_to_cpu = moe_utils.maybe_move_tensor_to_cpu = to_host


def _patch_megatron_collectives() -> None:
    """Gloo gathers and scatters only equal parts; tensor-parallel ranks of experts hold unequal numbers of tokens."""
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def uneven_gather(
        part: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(part, group, output_split_sizes, use_global_buffer)
        padded = part.new_zeros(max(output_split_sizes), *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([whole[:size] for whole, size in zip(parts, output_split_sizes, strict=True)])

    def uneven_reduce_scatter(
        whole: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(whole, group, input_split_sizes, use_global_buffer)
        total = whole.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].clone()

    mappings._gather_along_first_dim = uneven_gather
    mappings._reduce_scatter_along_first_dim = uneven_reduce_scatter


def install(device: str = "cpu", *, kind: str = "cpu") -> None:
    """Point ``cuda`` at the CPU, or at ``meta``, in this process, which uses no GPU. Idempotent.

    Args:
        device: what stands for ``cuda``; another call may change it.
        kind: of the device that ``meta`` stands for.
    """
    global _installed, _target, _kind
    _target, _kind = torch.device(device), kind
    if _installed:
        return
    _installed = True
    stream = _Stream()
    cuda = torch.cuda
    cuda.is_available = lambda: False  # also on a machine with GPUs, when the recipe asks for the CPU
    cuda.current_device = target
    cuda.synchronize = lambda *a, **k: None
    cuda.empty_cache = lambda: None
    cuda.current_stream = lambda *a, **k: stream
    cuda.default_stream = lambda *a, **k: stream
    cuda.stream = lambda *a, **k: stream
    cuda.manual_seed = lambda seed: None  # torch.manual_seed has seeded the one generator there is
    cuda.get_rng_state = _cpu_rng_state
    cuda.set_rng_state = _set_cpu_rng_state
    # `with torch.device(...)` acts on a set of factories that torch collects once, at first use: let it hold the real
    # ones. Else transformers' from_pretrained, which builds on the meta device, leaves rotary frequencies undefined.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _wrap_factory(getattr(torch, name)))
    torch.Tensor.to = _wrap_to(torch.Tensor.to)
    torch.Tensor.type = _wrap_type(torch.Tensor.type)
    torch.Tensor.cuda = lambda self, *a, **k: self
    torch.nn.Module.cuda = lambda self, *a, **k: self
    _patch_megatron_rng()
    _patch_megatron_optimizer()
    _patch_megatron_experts(stream)
    _patch_megatron_collectives()
