"""A linear layer's three products on rounded values, as Transformer Engine computes them.

``y = q(x) q(w)^T`` forward, ``dx = q(dy) q(w)`` and ``dw = q(dy)^T q(x)`` backward: every operand is rounded, products
are accumulated in float32 and leave in the layer's dtype (TE pytorch/module/linear.py; the same in layernorm_linear.py,
layernorm_mlp.py and, an expert at a time, grouped_linear.py). Each recipe is a function that rounds one of the three
operands for the two products that it is in.

Shapes: T tokens, K inputs, N outputs of this rank's part of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch.autograd.function import once_differentiable

from fire_megatron.config.schema import FP8Config
from fire_megatron.models.fp8.quantize import (
    E4M3,
    E5M2,
    Quantized,
    amax,
    current_scale,
    quantize,
    quantize_blocks,
    unrounded,
)

Operand = Literal["input", "weight", "gradient"]
OPERANDS: tuple[Operand, ...] = ("input", "weight", "gradient")


def format_of(operand: Operand, config: FP8Config) -> torch.dtype:
    """E4M3; E5M2 for gradients with ``format: hybrid`` (TE ``get_fp8_te_dtype``)."""
    return E5M2 if operand == "gradient" and config.format == "hybrid" else E4M3


class Rounding:
    """How a layer's operands become FP8."""

    def __init__(self, config: FP8Config) -> None:
        """Args: config: the role's."""
        self.formats = {operand: format_of(operand, config) for operand in OPERANDS}

    def __call__(self, operand: Operand, x: torch.Tensor, *, by_rows: bool) -> Quantized:
        """Round a matrix ([T, K], [N, K] or [T, N]) for a product that sums over its columns (``by_rows``) or rows."""
        raise NotImplementedError

    def both(self, operand: Operand, x: torch.Tensor) -> tuple[Quantized, Quantized]:
        """A matrix for the product that sums over its columns and for the one that sums over its rows, each rounded
        from the values before rounding."""
        return self(operand, x, by_rows=True), self(operand, x, by_rows=False)

    def observe(self, operand: Operand, x: torch.Tensor) -> None:
        """Take note of a matrix of a training pass, before it is rounded."""


class Tensorwise(Rounding):
    """One scale a tensor, by its own amax (TE ``Float8CurrentScaling``, with its float32 scales).

    A tensor is this rank's part of the layer: shards of a weight have scales of their own. Under sequence parallelism
    the tokens of all tensor-parallel ranks share one (TE reduces the amax, ``set_quantizer_amax_reduction_group``);
    here they are together before they are rounded, which is the same.
    """

    def __call__(self, operand: Operand, x: torch.Tensor, *, by_rows: bool) -> Quantized:
        """See :class:`Rounding`."""
        fmt = self.formats[operand]
        return quantize(x, fmt, current_scale(amax(x), fmt))

    def both(self, operand: Operand, x: torch.Tensor) -> tuple[Quantized, Quantized]:
        """The same values for both products."""
        rounded = self(operand, x, by_rows=True)
        return rounded, rounded


class Blockwise(Rounding):
    """A power of two for every 128 values along the sum, and for every 128 x 128 of a weight (TE
    ``Float8BlockScaling``)."""

    def __call__(self, operand: Operand, x: torch.Tensor, *, by_rows: bool) -> Quantized:
        """See :class:`Rounding`."""
        block = (128, 128) if operand == "weight" else (1, 128) if by_rows else (128, 1)
        return quantize_blocks(x, self.formats[operand], block)


class MX(Rounding):
    """A power of two for every 32 values along the sum (MX section 5.1; TE ``MXFP8BlockScaling``), weights too."""

    def __call__(self, operand: Operand, x: torch.Tensor, *, by_rows: bool) -> Quantized:
        """See :class:`Rounding`."""
        return quantize_blocks(x, self.formats[operand], (1, 32) if by_rows else (32, 1), mx=True)


class Delayed(Tensorwise):
    """One scale a tensor, by the largest magnitudes of earlier updates (TE ``DelayedScaling``); a tensor that has none
    yet is left alone. :class:`~fire_megatron.models.fp8.emulation.Scales` holds the scales."""

    def __init__(
        self,
        config: FP8Config,
        scale: Callable[[Operand], torch.Tensor | None],
        record: Callable[[Operand, torch.Tensor], None],
    ) -> None:
        """Args: config: the role's; scale: this layer's present scale, None before the first; record: takes an amax."""
        super().__init__(config)
        self._scale, self._record = scale, record

    def __call__(self, operand: Operand, x: torch.Tensor, *, by_rows: bool) -> Quantized:
        """See :class:`Rounding`."""
        scale = self._scale(operand)
        return unrounded(x) if scale is None else quantize(x, self.formats[operand], scale)

    def observe(self, operand: Operand, x: torch.Tensor) -> None:
        """Remember the largest magnitude until the update's end."""
        self._record(operand, amax(x))


class _Product(torch.autograd.Function):
    """[..., K] x [N, K] -> [..., N] in the input's dtype. Saves the input and the weight as rounded for the backward
    products: a byte a value. No collectives."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, rounding: Rounding, training: bool) -> torch.Tensor:
        ctx.rounding, ctx.shape, ctx.dtypes = rounding, x.shape, (x.dtype, weight.dtype)
        flat = x.reshape(-1, x.shape[-1])
        if training:
            rounding.observe("input", flat)
            rounding.observe("weight", weight)
            x_TK, x_down_TK = rounding.both("input", flat)
            w_NK, w_down_NK = rounding.both("weight", weight)
            ctx.save_for_backward(x_down_TK.codes, x_down_TK.inverse, w_down_NK.codes, w_down_NK.inverse)
            ctx.blocks = x_down_TK.block, w_down_NK.block
        else:
            x_TK, w_NK = (rounding(name, m, by_rows=True) for name, m in (("input", flat), ("weight", weight)))
        y_TN = x_TK.values() @ w_NK.values().t()
        return y_TN.to(x.dtype).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x_codes, x_inverse, w_codes, w_inverse = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        ctx.rounding.observe("gradient", flat)
        dy_TN, dy_down_TN = ctx.rounding.both("gradient", flat)
        dx, dw = None, None
        if ctx.needs_input_grad[0]:
            dx = dy_TN.values() @ Quantized(w_codes, w_inverse, ctx.blocks[1]).values()
            dx = dx.to(ctx.dtypes[0]).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dw = dy_down_TN.values().t() @ Quantized(x_codes, x_inverse, ctx.blocks[0]).values()
            dw = dw.to(ctx.dtypes[1])
        return dx, dw, None, None


class EmulatedLinear:
    """Stands for megatron-core's choice of a product (``_forward_impl`` of ColumnParallelLinear and RowParallelLinear,
    tensor_parallel/layers.py), with the same collectives over the tensor-parallel group: under sequence parallelism an
    all-gather of the input and a reduce-scatter of its gradient, otherwise the gradient's all-reduce where it is asked
    for. megatron-core's wants a fused accumulation of gradients only on a GPU."""

    def __init__(self, rounding: Rounding) -> None:
        """Args: rounding: the layer's."""
        self.rounding = rounding

    def __call__(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        sequence_parallel: bool = False,
        allreduce_dgrad: bool = False,
        tp_group: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        """[T or this rank's part of T, ..., K] x [N, K] (+ [N]) -> [T, ..., N]. The bias is not rounded."""
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        training = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        output = _Product.apply(input, weight, self.rounding, training)
        return output if bias is None else output + bias
