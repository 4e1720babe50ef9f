"""Weights laid out for the matrix products of decode steps on a CPU.

A decode step multiplies a handful of rows by every weight, so it runs at the speed of reading them. The matrix product
that torch calls otherwise copies the weight into its own layout each time; oneDNN does that once and keeps the result,
which is what torch's own freezing does for inference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

Linear = ColumnParallelLinear | RowParallelLinear


def _usable(weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _product(packed: torch.Tensor) -> Callable[..., torch.Tensor]:
    """In place of megatron-core's ``linear_with_frozen_weight``: the same product, without its backward pass."""

    def forward(
        input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **_: object
    ) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")

    return forward


@contextlib.contextmanager
def packed_linears(weights: list[tuple[Linear, torch.Tensor]], rows: int) -> Iterator[None]:
    """Within the context these layers multiply by a packed copy of their weights; without one where that is no gain.

    The layers' collectives and biases stay megatron-core's: only the product inside is replaced, at the place where
    megatron-core chooses between its own implementations. Memory: a second copy of the weights while it lasts.

    Args:
        weights: layers with the weight that each is going to be called with. No gradients; the weights must not
            change meanwhile.
        rows: rows of a decode step, for which the layout is chosen; other numbers of rows are right too.
    """
    usable = [(layer, weight) for layer, weight in weights if _usable(weight)]
    try:
        for layer, weight in usable:
            layer._forward_impl = _product(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows))
        yield
    finally:
        for layer, _ in usable:
            layer.__dict__.pop("_forward_impl", None)
