"""Reductions over the ranks that hold different rows, passed to the code that needs global statistics."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fire_megatron.parallel.collectives import all_gather_flat


class Reducer:
    """Sum, max and ragged gather over one group; with no group, over this process alone."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Args: group: the data-parallel (x context-parallel) ranks."""
        self.group = group if group is not None and group.size() > 1 else None

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over the ranks; the input is not changed."""
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum over the ranks; the input is not changed."""
        return self._all_reduce(values, dist.ReduceOp.MAX)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """[n] of any length a rank -> all of them, in rank order."""
        return values if self.group is None else torch.cat(all_gather_flat(values, group=self.group))

    def _all_reduce(self, values: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        result = values.clone()
        if self.group is not None:
            dist.all_reduce(result, op=op, group=self.group)
        return result
