"""Reductions over the ranks that hold different rows, passed to the code that needs global statistics."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from fire_megatron.parallel.collectives import all_gather_flat


class Reducer:
    """Sum, max and ragged gather over one group; with no group, over this process alone.

    Collective: every rank of the group makes the same calls in the same order, also a rank that holds no rows.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Args: group: the data-parallel (x context-parallel) ranks; None for this process alone."""
        self.group = group if group is not None and group.size() > 1 else None

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over the ranks, of one shape on all of them; the input is not changed."""
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum over the ranks, of one shape on all of them; the input is not changed."""
        return self._all_reduce(values, dist.ReduceOp.MAX)

    def gather_rows(self, values: torch.Tensor) -> torch.Tensor:
        """[n, ...] with n of any size a rank, also 0 -> the rows of all ranks, in rank order."""
        if self.group is None:
            return values
        trailing = values.shape[1:]
        assert math.prod(trailing) > 0, f"rows of shape {tuple(trailing)} carry nothing, so they cannot be counted"
        flat = torch.cat(all_gather_flat(values.flatten(), group=self.group))
        return flat.view(-1, *trailing)

    def _all_reduce(self, values: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        result = values.detach().clone(memory_format=torch.contiguous_format)
        if self.group is not None:
            dist.all_reduce(result, op=op, group=self.group)
        return result
