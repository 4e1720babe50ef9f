"""The gated activation of feed-forward layers, ``silu(gate) * up``, and its gradient in one pass each.

Shapes: N tokens, F columns of the activation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024
"""Columns at a time."""


@triton.jit
def _forward(both, out, columns, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, source = column < columns, both + row * 2 * columns + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(both, grad, out, columns, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, source, target = column < columns, both + row * 2 * columns + column, out + row * 2 * columns + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + columns, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(grad + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    of_gate = upstream * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(target, of_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(target + columns, (upstream * gate * sigmoid).to(out.dtype.element_ty), mask=inside)


def swiglu(both: torch.Tensor) -> torch.Tensor:
    """[..., 2 F] contiguous, gates first -> [..., F] in the same dtype, computed in float32."""
    columns, rows = both.shape[-1] // 2, both.shape[:-1].numel()
    out = both.new_empty(*both.shape[:-1], columns)
    if rows:
        _forward[(rows, triton.cdiv(columns, _BLOCK))](both, out, columns, BLOCK=_BLOCK)
    return out


def swiglu_gradient(both: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The input [..., 2 F] and the gradient of the result [..., F], both contiguous -> that of the input."""
    columns, rows = grad.shape[-1], grad.shape[:-1].numel()
    out = torch.empty_like(both)
    if rows:
        _backward[(rows, triton.cdiv(columns, _BLOCK))](both, grad, out, columns, BLOCK=_BLOCK)
    return out
