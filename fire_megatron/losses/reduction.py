"""The one place that divides.

A training step's loss is a mean over the response tokens of the kept trajectories of the whole update, wherever
their micro-batches run. So each micro-batch contributes its sum divided by that global count, and gradients are
summed over micro-batches and data-parallel ranks, never averaged: a mean of means would weigh a token in a short
micro-batch more than one in a long one.
"""

from __future__ import annotations

import torch

from fire_megatron.parallel.reducer import Reducer


def global_token_count(local_tokens: int, *, reducer: Reducer, device: torch.device) -> float:
    """Response tokens of the update over all ranks that hold different rows. Collective.

    Args:
        local_tokens: response tokens of this rank's kept trajectories, over all its micro-batches; may be 0.
        reducer: over the data-parallel (x context-parallel) ranks.
        device: where the group's backend wants its tensors.
    """
    return float(reducer.sum(torch.tensor([local_tokens], dtype=torch.float64, device=device)))


def token_mean(per_token: torch.Tensor, global_tokens: float) -> torch.Tensor:
    """This micro-batch's share of the global token mean: a scalar, also for no tokens at all.

    Args:
        per_token: [N] losses of the micro-batch's response tokens.
        global_tokens: from :func:`global_token_count`, positive: an update without tokens is not one.
    """
    assert global_tokens > 0, global_tokens
    return per_token.sum() / global_tokens
