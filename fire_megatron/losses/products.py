"""Products of hidden states and an output weight: in which format the factors are, and that sums are float32.

Logits are at least float32, whatever the model's format: in bfloat16 logits of 16 to 32 would be rounded to multiples
of 1/8, and log-probabilities by some 0.04 nats. Three ways lead there, one for each format and device:

- **As they are**, where the weight is float32 or wider.
- **Half precision on a GPU.** The product of two half-precision matrices leaves in float32, as it is summed inside.
  Gradients of logits, which are float32, are rounded to the weight's format as a factor of the two products of the
  backward pass; sums over chunks are not.
- **Half precision elsewhere** (a CPU, or torch before 2.8): one tile of the weight after the other is copied to
  float32. Half-precision factors have no more bits than TF32, so logits are the same where the user has allowed that.

Shapes: C tokens, H hidden size, V rows of an output weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fire_megatron.platform.device import device_kind

_TILE_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Elements of a weight, or of its gradient, that exist in another dtype at a time."""
_MM_WIDENS = torch.__version__ >= (2, 8)
"""``torch.mm`` of half-precision matrices has ``out_dtype``, on a GPU alone."""
_ADDMM_WIDENS = torch.__version__ >= (2, 10)
"""``torch.addmm`` has it too, and adds to a float32 matrix in place."""


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Format of logits and of a weight's gradient while it is summed up: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def tiles(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of the rows of a matrix [rows, width], to be held in another dtype one at a time."""
    step = max(1, _TILE_ELEMENTS.get(device_kind(device), _TILE_ELEMENTS["cuda"]) // max(width, 1))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def _widens(weight_VH: torch.Tensor) -> bool:
    """Whether the device multiplies the weight's format into float32 by itself."""
    half = weight_VH.dtype in (torch.bfloat16, torch.float16)
    return _MM_WIDENS and half and device_kind(weight_VH.device) == "cuda"


def _wide_rows(weight_VH: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The rows in the sums' dtype: all at once where that is the weight's, else one tile at a time."""
    dtype = sum_dtype(weight_VH.dtype)
    if dtype == weight_VH.dtype:
        yield slice(0, len(weight_VH)), weight_VH
        return
    for tile in tiles(*weight_VH.shape, weight_VH.device):
        yield tile, weight_VH[tile].to(dtype)


@torch.no_grad()
def project(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, out_CV: torch.Tensor | None = None) -> torch.Tensor:
    """Logits, without gradient.

    Args:
        hidden_CH: [C, H] of any float dtype; of the weight's, or its numbers are rounded to that on a GPU.
        weight_VH: [V, H].
        out_CV: where to; memory of its own if None.

    Returns:
        [C, V] at least float32.
    """
    dtype = sum_dtype(weight_VH.dtype)
    if out_CV is None:
        out_CV = hidden_CH.new_empty(len(hidden_CH), len(weight_VH), dtype=dtype)
    assert out_CV.dtype == dtype, out_CV.dtype
    if _widens(weight_VH):
        return torch.mm(hidden_CH.to(weight_VH.dtype), weight_VH.t(), out_dtype=dtype, out=out_CV)
    hidden_CH = hidden_CH.to(dtype)
    for tile, rows in _wide_rows(weight_VH):
        torch.mm(hidden_CH, rows.t(), out=out_CV[:, tile])
    return out_CV


def as_factor(grad_CV: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    """The gradient of logits as :func:`hidden_gradient` and :func:`add_weight_gradient` take it: in the format in which
    this device multiplies by such a weight. [C, V]"""
    return grad_CV.to(weight_VH.dtype if _widens(weight_VH) else sum_dtype(weight_VH.dtype))


@torch.no_grad()
def hidden_gradient(factor_CV: torch.Tensor, weight_VH: torch.Tensor, out_CH: torch.Tensor) -> None:
    """Write the gradient of hidden states [C, H] from that of their logits.

    Args:
        factor_CV: from :func:`as_factor`.
        weight_VH: [V, H].
        out_CH: where to, of any dtype; sums are rounded to it once.
    """
    if factor_CV.dtype == weight_VH.dtype == out_CH.dtype:
        torch.mm(factor_CV, weight_VH, out=out_CH)
        return
    if _widens(weight_VH):
        out_CH.copy_(torch.mm(factor_CV, weight_VH, out_dtype=sum_dtype(weight_VH.dtype)))
        return
    total_CH = torch.zeros(out_CH.shape, dtype=factor_CV.dtype, device=out_CH.device)
    for tile, rows in _wide_rows(weight_VH):
        torch.addmm(total_CH, factor_CV[:, tile], rows, out=total_CH)
    out_CH.copy_(total_CH)


@torch.no_grad()
def add_weight_gradient(factor_CV: torch.Tensor, hidden_CH: torch.Tensor, total_VH: torch.Tensor) -> None:
    """Add the gradient of a weight [V, H] to a sum, rounding neither.

    Args:
        factor_CV: from :func:`as_factor`.
        hidden_CH: [C, H] of any float dtype.
        total_VH: the sum, at least float32.
    """
    hidden_CH = hidden_CH.to(factor_CV.dtype)
    if factor_CV.dtype == total_VH.dtype:
        torch.addmm(total_VH, factor_CV.t(), hidden_CH, out=total_VH)
    elif _ADDMM_WIDENS:
        torch.addmm(total_VH, factor_CV.t(), hidden_CH, out_dtype=total_VH.dtype, out=total_VH)
    else:
        for tile in tiles(*total_VH.shape, total_VH.device):
            total_VH[tile] += torch.mm(factor_CV[:, tile].t(), hidden_CH, out_dtype=total_VH.dtype)
