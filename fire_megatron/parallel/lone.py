"""Groups of one rank, within which megatron-core communicates too.

The first collective on a group makes a communicator, also of one rank: with NCCL some hundred MB of GPU memory and
seconds at start-up. Our own functions ask a group for its size first; megatron-core's do not everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer


class _Done(dist.Work):
    """For who waits for a collective later."""

    def wait(self, timeout: object = None) -> bool:
        """Nothing to wait for."""
        return True

    def is_completed(self) -> bool:
        """It has been since it was asked for."""
        return True


def _silenced(function: Callable[..., Any], alone: Callable[..., None]) -> Callable[..., Any]:
    """A collective that does ``alone`` with its first two arguments in a group of one."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def collective(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        group = given.get("group")
        if group is None or group.size() > 1:
            return function(*args, **kwargs)
        alone(*list(given.values())[:2])
        return _Done() if given.get("async_op") else None

    return collective


def _stays(*_: Any) -> None:
    """The input is the result."""


def _moves(output: torch.Tensor, values: torch.Tensor) -> None:
    """From one tensor into another, which may be the same memory."""
    if output.data_ptr() != values.data_ptr():
        output.copy_(values.view_as(output))


def _enters(gathered: list[Any], value: Any) -> None:
    """An object into a list."""
    gathered[0] = value


_CALLED = [
    (dist, "all_reduce", _stays),  # gradients without the distributed optimizer, their norm, FP8's amaxes
    (dist, "all_gather_object", _enters),  # the optimizer's groups of parameters
    (param_and_grad_buffer, "dist_reduce_scatter_func", _moves),  # gradients and weights of the distributed optimizer,
    (param_and_grad_buffer, "dist_all_gather_func", _moves),  # also of experts, whose replicas are fewer
]
"""Where megatron-core 0.16.1 and 0.19.2 find what they call without asking for the group's size, while an optimizer is
built, gradients are reduced and applied. In layers and pipeline they ask."""


@contextlib.contextmanager
def lone_groups_silent() -> Iterator[None]:
    """Within the context, megatron-core's collectives on groups of one rank do without communication."""
    real = [getattr(module, name) for module, name, _ in _CALLED]
    for (module, name, alone), function in zip(_CALLED, real, strict=True):
        setattr(module, name, _silenced(function, alone))
    try:
        yield
    finally:
        for (module, name, _), function in zip(_CALLED, real, strict=True):
            setattr(module, name, function)
