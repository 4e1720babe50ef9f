"""Groups of one rank, within which megatron-core communicates too.

The first collective on a group makes a communicator, also of one rank: with NCCL some hundred MB of GPU memory and
seconds at start-up. Our own functions ask a group for its size first; megatron-core's do not everywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """A collective whose input is its result in a group of one."""

    def collective(*args: Any, group: dist.ProcessGroup | None = None, **kwargs: Any) -> Any:
        return None if _alone(group, kwargs) else function(*args, group=group, **kwargs)

    return collective


def _into(function: Callable[..., Any]) -> Callable[..., Any]:
    """A collective from one tensor into another, which may be the same memory."""

    def collective(
        output: torch.Tensor, values: torch.Tensor, *, group: dist.ProcessGroup | None = None, **kwargs: Any
    ) -> Any:
        if not _alone(group, kwargs):
            return function(output, values, group=group, **kwargs)
        if output.data_ptr() != values.data_ptr():
            output.copy_(values.view_as(output))
        return None

    return collective


def _objects(function: Callable[..., Any]) -> Callable[..., Any]:
    def collective(gathered: list[Any], value: Any, group: dist.ProcessGroup | None = None) -> None:
        if _alone(group, {}):
            gathered[0] = value
        else:
            function(gathered, value, group=group)

    return collective


def _alone(group: dist.ProcessGroup | None, options: dict[str, Any]) -> bool:
    alone = group is not None and group.size() == 1
    assert not (alone and options.get("async_op")), "nobody waits for this"
    return alone


_CALLED = [
    (dist, "all_reduce", _in_place),  # gradients without the distributed optimizer, their norm, FP8's amaxes
    (dist, "all_gather_object", _objects),  # the optimizer's groups of parameters
    (param_and_grad_buffer, "dist_reduce_scatter_func", _into),  # gradients and weights of the distributed optimizer,
    (param_and_grad_buffer, "dist_all_gather_func", _into),  # also of experts, whose replicas are fewer
]
"""Where megatron-core 0.16.1 and 0.19.2 find what they call without asking for the group's size, while an optimizer is
built, gradients are reduced and applied. In layers and pipeline they ask."""


@contextlib.contextmanager
def lone_groups_silent() -> Iterator[None]:
    """Within the context, megatron-core's collectives on groups of one rank do without communication."""
    real = [getattr(module, name) for module, name, _ in _CALLED]
    for (module, name, silenced), function in zip(_CALLED, real, strict=True):
        setattr(module, name, silenced(function))
    try:
        yield
    finally:
        for (module, name, _), function in zip(_CALLED, real, strict=True):
            setattr(module, name, function)
