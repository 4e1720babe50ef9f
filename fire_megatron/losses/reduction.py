"""The one place that divides.

A training step's loss is a mean over the response tokens of the kept trajectories of the whole update, wherever
their micro-batches run. So each micro-batch contributes its sum divided by that global count, and gradients are
summed over micro-batches and data-parallel ranks, never averaged.
"""

from __future__ import annotations

from typing import Protocol

import torch


class SumReducer(Protocol):
    """What is needed of :class:`fire_megatron.parallel.reducer.Reducer`."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over the ranks."""
        ...


def global_token_count(local_tokens: int, *, reducer: SumReducer, device: torch.device) -> float:
    """Response tokens of the update over all ranks that hold different rows. Collective."""
    return float(reducer.sum(torch.tensor([local_tokens], dtype=torch.float64, device=device)))


def token_mean(per_token: torch.Tensor, global_tokens: float) -> torch.Tensor:
    """This micro-batch's share of the global token mean: a scalar, also for no tokens at all.

    Args:
        per_token: [N] losses of the micro-batch's response tokens.
        global_tokens: from :func:`global_token_count`, positive.
    """
    return per_token.sum() / global_tokens
