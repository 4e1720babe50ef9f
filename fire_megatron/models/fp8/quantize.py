"""Rounding to 8-bit floating point with Transformer Engine's scales, on any device that torch casts on.

Values are multiplied by a scale that brings the largest magnitude (amax) to the format's largest number, cast, and
divided by the scale again. What differs is who shares a scale: a tensor, or a block of it. Cited below:

- TE: Transformer Engine 2.20, github.com/NVIDIA/TransformerEngine;
- MX: OCP Microscaling Formats (MX) Specification v1.0, September 2023;
- FP8: Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv 2209.05433.

Shapes: R rows, C columns of a matrix; r, c rows and columns of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
"""FP8, table 1: 4 bits of exponent and 3 of mantissa, to 448; 5 and 2, to 57344."""
_FLOAT32_MAX = torch.finfo(torch.float32).max
_MANTISSA, _EXPONENT = 0x007FFFFF, 0xFF
"""Fields of a float32: 23 bits of mantissa, above them 8 of exponent."""


def largest_number(fmt: torch.dtype) -> float:
    """The format's largest number: 448 or 57344."""
    return torch.finfo(fmt).max


def cast(x: torch.Tensor, fmt: torch.dtype) -> torch.Tensor:
    """float32 -> FP8, to the nearest, ties to even. What is too large becomes the largest number, infinity too (TE's
    conversions are ``satfinite``; torch's own make it NaN or infinity); NaN stays."""
    return x.clamp(-largest_number(fmt), largest_number(fmt)).to(fmt)


def amax(x: torch.Tensor) -> torch.Tensor:
    """[...] of any type -> [] float32, its largest magnitude; 0 where there is nothing."""
    return x.detach().abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)


def current_scale(peak: torch.Tensor, fmt: torch.dtype, *, power_of_two: bool = False) -> torch.Tensor:
    """Scale by a tensor's or block's own amax (TE ``compute_scale_from_amax``, common/recipe/recipe_common.cuh).

    Args:
        peak: float32 amax, of any shape.
        fmt: the format to scale for.
        power_of_two: round the scale down to a power of two, which leaves the values' mantissas as they are.

    Returns:
        float32 of that shape: largest number / amax, 1 where amax is 0, infinite or NaN.
    """
    scale = (largest_number(fmt) / peak).clamp(max=_FLOAT32_MAX)
    if power_of_two:
        scale = (scale.view(torch.int32) & ~_MANTISSA).view(torch.float32)
    return torch.where(peak.isfinite() & (peak > 0), scale, torch.ones_like(scale))


def delayed_scale(peak: torch.Tensor, previous: torch.Tensor, fmt: torch.dtype, *, margin: int) -> torch.Tensor:
    """Scale by an amax of earlier steps (TE ``_default_sf_compute``, pytorch/quantization.py).

    Args:
        peak: float32 amax, of any shape.
        previous: float32 scales so far, which stay where amax is 0, infinite or NaN.
        fmt: the format to scale for.
        margin: powers of two to leave free above the amax.
    """
    scale = (largest_number(fmt) / peak / 2**margin).clamp(max=_FLOAT32_MAX)
    return torch.where(peak.isfinite() & (peak > 0), scale, previous)


def mx_exponent(peak: torch.Tensor, fmt: torch.dtype) -> torch.Tensor:
    """The biased exponent of a block's shared scale, E8M0 (MX section 5.4.1): float32 amax -> int32, 0 to 255.

    TE (``float_to_e8m0``, common/util/ptx.cuh) rounds amax / largest number up to a power of two, so that nothing
    saturates (arXiv 2506.08027); with MX section 6.3's floor(log2(amax)) minus the format's largest exponent the top
    quarter of a binade does. Infinity gives 254, the largest scale, NaN 255, MX's code of NaN.
    """
    wanted = peak * torch.tensor(1.0 / largest_number(fmt), dtype=torch.float32)
    bits = wanted.view(torch.int32)
    exponent, mantissa = bits >> 23 & _EXPONENT, bits & _MANTISSA
    # Exponent 0 stands for 2^-127, which in float32 is a subnormal number with the highest bit of its mantissa alone.
    above = (mantissa > 0) & (exponent < 254) & ~((exponent == 0) & (mantissa <= 0x400000))
    exponent = torch.where(wanted.isinf(), 254, exponent + above)
    return torch.where(wanted.isnan(), 255, exponent).int()


class Quantized(NamedTuple):
    """A matrix in FP8, or left alone."""

    codes: torch.Tensor
    """[R, C] FP8; of another type where the matrix is not rounded."""
    inverse: torch.Tensor | None
    """[] or [R / r, C / c] float32, one over the scale of the matrix or its blocks; None where it is not rounded."""
    block: tuple[int, int] | None = None
    """(r, c) rows and columns of a block; None for one scale."""

    def values(self) -> torch.Tensor:
        """[R, C] what the codes stand for, float32 (float64 where a float64 matrix is left alone)."""
        if self.inverse is None:
            return self.codes.to(torch.promote_types(self.codes.dtype, torch.float32))
        values = self.codes.float()
        if self.block is None:
            return values * self.inverse
        (rows, columns), (r, c) = values.shape, self.block
        blocks = self.inverse.repeat_interleave(r, 0).repeat_interleave(c, 1)
        return values * blocks[:rows, :columns]


def unrounded(x: torch.Tensor) -> Quantized:
    """A matrix as it is."""
    return Quantized(x, None)


def quantize(x: torch.Tensor, fmt: torch.dtype, scale: torch.Tensor) -> Quantized:
    """[R, C] with one scale ([] float32). TE multiplies in float32 and keeps the scale's reciprocal."""
    return Quantized(cast(x.float() * scale, fmt), scale.reciprocal())


def quantize_blocks(x: torch.Tensor, fmt: torch.dtype, block: tuple[int, int], *, mx: bool = False) -> Quantized:
    """[R, C] with a scale for each block, by its own amax. Blocks at the ends may be incomplete.

    Args:
        x: the matrix.
        fmt: the format of its codes.
        block: (r, c): (1, 128) and (128, 1) for vectors along and across rows, (128, 128) for squares.
        mx: whether scales are MX's; otherwise powers of two rounded down, TE's for block scaling
            (``Float8BlockScaling``, after DeepSeek-V3, arXiv 2412.19437, section 3.3.2, whose scales are any float32).
    """
    (rows, columns), (r, c) = x.shape, block
    up, across = -(-rows // r), -(-columns // c)
    padded = F.pad(x.float(), (0, across * c - columns, 0, up * r - rows)).view(up, r, across, c)
    peak = padded.abs().amax(dim=(1, 3))
    if mx:
        exponent = mx_exponent(peak, fmt)
        inverse = torch.ldexp(torch.ones_like(peak), exponent - 127)
        inverse = torch.where(exponent == 255, torch.nan, inverse)
        scale = torch.ldexp(torch.ones_like(peak), 127 - exponent)
    else:
        scale = current_scale(peak, fmt, power_of_two=True)
        inverse = scale.reciprocal()
    codes = cast(padded * scale[:, None, :, None], fmt).view(up * r, across * c)[:rows, :columns]
    return Quantized(codes.contiguous(), inverse, block)
