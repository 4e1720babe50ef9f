"""Collectives on explicit groups that the layers above share."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from fire_megatron.config.errors import RecipeError, RecipeProblems, UserError
from fire_megatron.platform.device import compute_device
from fire_megatron.platform.watch import tick

T = TypeVar("T")


def all_gather_objects(value: T, *, group: dist.ProcessGroup) -> list[T]:
    """Gather one picklable object a rank, in rank order. For control data, not for tensors of the hot path."""
    if group.size() == 1:
        return [value]
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, value, group=group)
    if threading.current_thread() is threading.main_thread():
        tick()  # to have waited for others until they came is progress
    return gathered


def wait_for_all(*, group: dist.ProcessGroup) -> None:
    """Until every rank of a group is here: of gloo, and patient, where some of them may take long."""
    if group.size() > 1:
        dist.barrier(group=group)
        tick()


def all_gather_flat(values: torch.Tensor, *, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Gather 1-D tensors of different lengths.

    Args:
        values: [n], any dtype that the backend carries; n may differ between ranks and be 0.
        group: the ranks that take part.

    Returns:
        One tensor a rank, in rank order. One all-gather of lengths and one of data padded to the longest.
    """
    if group.size() == 1:
        return [values]
    length = torch.tensor([values.numel()], dtype=torch.int64, device=values.device)
    lengths = [torch.empty_like(length) for _ in range(group.size())]
    dist.all_gather(lengths, length, group=group)
    counts = torch.cat(lengths).tolist()  # one wait for the device, not one a rank
    longest = max(counts)
    if longest == 0:
        return [values.new_empty(0) for _ in counts]
    padded = values.new_zeros(longest)
    padded[: values.numel()] = values
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=group)
    return [data[:count] for data, count in zip(gathered, counts, strict=True)]


def all_gather_stacked(values: torch.Tensor, *, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[...], of one shape on all ranks -> [ranks, ...] in rank order; one rank where there is no group."""
    if group is None or group.size() == 1:
        return values[None]
    shards = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(shards, values.contiguous(), group=group)
    return torch.stack(shards)


def gather_with_gradient(values: torch.Tensor, *, group: dist.ProcessGroup) -> torch.Tensor:
    """[n, ...], of one shape on all ranks -> [ranks * n, ...] in rank order, differentiable.

    One all-gather; in backward one reduce-scatter, which sums over the ranks what each of them says of this rank's
    values.
    """
    return values if group.size() == 1 else _Gather.apply(values, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        gathered = values.new_empty(group.size() * len(values), *values.shape[1:])
        dist.all_gather_into_tensor(gathered, values.contiguous(), group=group)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        own = grad.new_empty(len(grad) // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None


def broadcast_flat(
    values: torch.Tensor | None,
    *,
    numel: int,
    dtype: torch.dtype,
    device: torch.device,
    src: int,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Broadcast a 1-D tensor of known length from global rank ``src`` to the rest of ``group``."""
    if group.size() == 1:
        assert values is not None
        return values
    if dist.get_rank() != src:
        values = torch.empty(numel, dtype=dtype, device=device)
    assert values is not None and values.numel() == numel and values.dtype == dtype
    values = values.contiguous()
    dist.broadcast(values, src=src, group=group)
    return values


def largest(*values: int, group: dist.ProcessGroup) -> list[int]:
    """The largest of the ranks' numbers, of each; no communication in a group of one."""
    if group.size() == 1:
        return list(values)
    box = torch.tensor(values, dtype=torch.int64, device=compute_device())
    dist.all_reduce(box, op=dist.ReduceOp.MAX, group=group)
    return box.tolist()


@contextlib.contextmanager
def world_narrowed_to(group: dist.ProcessGroup) -> Iterator[None]:
    """Within the context, ``all_gather_object`` and ``get_world_size`` without a group mean this one.

    megatron-core's optimizer compares parameter groups over the whole world (``optimizer/__init__.py``), also where the
    model is on some of its ranks.
    """
    gather, size = dist.all_gather_object, dist.get_world_size
    dist.all_gather_object = lambda objects, value, group=group: gather(objects, value, group=group)
    dist.get_world_size = lambda group=group: size(group)
    try:
        yield
    finally:
        dist.all_gather_object, dist.get_world_size = gather, size


def on_all_ranks(action: Callable[..., T], *args: object, group: dist.ProcessGroup, **kwargs: object) -> T:
    """Run something that may find a user's mistake; if any rank of ``group`` does, every rank raises, so that none
    waits for another. Where the action itself communicates, it must raise on all the ranks that take part or on none
    before the last message.

    Raises:
        UserError: of the first rank's type, with what all of them have found.
    """
    problem, result = None, None
    try:
        result = action(*args, **kwargs)
    except UserError as error:
        problem = error
    _raise_on_any(problem, group=group)
    return result  # type: ignore[return-value]


def _raise_on_any(problem: UserError | None, *, group: dist.ProcessGroup) -> None:
    """Raise on every rank of ``group`` when any rank has a problem."""
    kind = RecipeError if isinstance(problem, RecipeProblems) else type(problem)  # made from more than its message
    mine = None if problem is None else (str(problem), kind, problem.passing)
    told = [entry for entry in all_gather_objects(mine, group=group) if entry is not None]
    if told:
        raised = told[0][1]("\n".join(dict.fromkeys(text for text, _, _ in told)))
        raised.everywhere, raised.passing = True, all(passing for _, _, passing in told)
        raise raised


def all_gather_rows(
    rows: Sequence[torch.Tensor], *, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup
) -> list[torch.Tensor]:
    """Gather ragged rows from every rank.

    Args:
        rows: [n_i] one 1-D CPU tensor a row; any number of rows, also none.
        dtype: element type, the same on every rank.
        device: where the backend wants its tensors.
        group: the ranks that take part.

    Returns:
        All rows in rank order, on CPU. Two ragged gathers (lengths, data), whatever the number of rows.
    """
    if group.size() == 1:
        return list(rows)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device=device)
    data = torch.cat([torch.zeros(0, dtype=dtype), *(row.to(dtype) for row in rows)]).to(device)
    counts = [c.tolist() for c in all_gather_flat(lengths, group=group)]
    gathered = [d.cpu() for d in all_gather_flat(data, group=group)]
    return [row for d, c in zip(gathered, counts, strict=True) for row in d.split(c)]
