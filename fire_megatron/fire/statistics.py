"""Statistics over a batch that is split over ranks: the same bits however it is split.

Floating-point addition depends on its order, so a row's score, or the mean weight, would change in its last bit with
the padded width, the number of ranks, or the place of a row, and a row at the threshold would be kept in one layout
and dropped in another. Sums here are taken over whole multiples of 2^-30 in float64, which add up exactly.

Shapes: B rows of this rank, R longest response, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fire_megatron.parallel.reducer import Reducer

_UNIT = 2.0**30
"""Steps of 2^-30 (1e-9, far below float32's resolution of these values) add up exactly to a total of 2^23."""


def exact_sum(values: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Sum in float64 that is the same in every order, as is the sum of such sums.

    Args:
        values: floats; each is rounded to the nearest multiple of 2^-30.
        dim: dimension to sum over; None for all.
    """
    return (values.double() * _UNIT).round_().sum(dim) / _UNIT


def row_means(values_BR: torch.Tensor, mask_BR: torch.Tensor) -> torch.Tensor:
    """[B] float64: mean over each row's response tokens; 0 for an empty row."""
    total_B = exact_sum(torch.where(mask_BR, values_BR, 0), -1)
    return total_B / mask_BR.sum(-1).clamp_min(1)


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile of sorted values with linear interpolation.

    Where it falls on a value it is that value exactly: ``q * (n - 1) / 100`` is computed in this order because
    ``q / 100`` is rounded, which would put the threshold a hair above a row that belongs to the kept ones.
    """
    position = q * (len(values) - 1) / 100
    below = math.floor(position)
    fraction = position - below
    if fraction == 0:
        return values[below]
    return values[below] + fraction * (values[below + 1] - values[below])


def group_percentiles(
    values_B: torch.Tensor, group_B: torch.Tensor, *, groups: int, q: float, reducer: Reducer
) -> list[float | None]:
    """The q-th percentile of each group's values over all ranks; None for a group without any.

    The values are gathered, so the percentile is exact, and sorted, so every rank and split finds the same number.
    Collective: one ragged gather of two numbers a row.

    Args:
        values_B: [B] float64.
        group_B: [B] int64, group of each value.
        groups: number of groups.
        q: percentile, 0 to 100.
        reducer: over the ranks that hold the other rows.
    """
    table = reducer.gather_rows(torch.stack((values_B.double(), group_B.double()), dim=-1)).cpu()
    members = [sorted(table[table[:, 1] == group, 0].tolist()) for group in range(groups)]
    return [percentile(values, q) if values else None for values in members]


def group_maxima(values_BR: torch.Tensor, mask_BR: torch.Tensor, group_B: torch.Tensor, *, groups: int) -> torch.Tensor:
    """[G] float32: this rank's maximum over each group's response tokens; 0 for a group without any."""
    maxima_G = values_BR.new_zeros(groups, dtype=torch.float32)
    if values_BR.numel() == 0:
        return maxima_G
    row_B = torch.where(mask_BR, values_BR, 0).amax(-1).float()
    return maxima_G.scatter_reduce(0, group_B, row_B, "amax")
