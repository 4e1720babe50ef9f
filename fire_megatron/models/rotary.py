"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) with halves as pairs, as Llama's.

Shapes: D dimensions of a head that are rotated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fire_megatron import kernels

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines [..., 1, D] of each token's angles, whose second half equals the first."""


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotate queries or keys.

    Args:
        x: [..., heads, D].
        rotary: in the dtype of x.
    """
    return _Rotate.apply(x, *rotary)


class _Rotate(torch.autograd.Function):
    """A rotation, whose transpose is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _rotated(grad, *ctx.saved_tensors, back=True), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool = False) -> torch.Tensor:
    if kernels.usable(x):
        from fire_megatron.kernels.rotary import rotate as in_one_pass

        return in_one_pass(x, cos, sin, back=back)
    turned = x * sin
    first, second = turned.chunk(2, dim=-1)
    quarter = (second, -first) if back else (-second, first)
    return x * cos + torch.cat(quarter, dim=-1)
