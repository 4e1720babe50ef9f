"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) with halves as pairs, as Llama's, in one pass.

Shapes: T tokens, D dimensions of a head that are rotated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rotate(
    x, out, cos, sin, heads, half, stride_token, stride_head,
    SIGN: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """All heads of one token; products in float32, rounded once."""
    token = tl.program_id(0).to(tl.int64)
    head, place = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)
    angle = place < half
    inside = (head < heads) & angle[None, :]
    source = x + token * stride_token + head * stride_head + place[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    angles = token * 2 * half + place
    c = tl.load(cos + angles, mask=angle, other=0.0).to(tl.float32)[None, :]
    s = SIGN * tl.load(sin + angles, mask=angle, other=0.0).to(tl.float32)[None, :]
    target = out + token * heads * 2 * half + head * (2 * half) + place[None, :]
    tl.store(target, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(target + half, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool = False) -> torch.Tensor:
    """Rotate every head of every token.

    Args:
        x: [..., heads, D] of any strides.
        cos, sin: [..., 1, D] of each token's angles, contiguous, the second half equal to the first.
        back: by the negative angles.

    Returns:
        The same shape and dtype, contiguous; computed in float32.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_THD = x.flatten(0, -3)
    x_THD = x_THD if x_THD.stride(2) == 1 else x_THD.contiguous()
    tokens, heads, size = x_THD.shape
    assert cos.numel() == sin.numel() == tokens * size, (cos.shape, x.shape)
    if tokens:
        _rotate[(tokens,)](
            x_THD, out, cos, sin, heads, size // 2, x_THD.stride(0), x_THD.stride(1),
            SIGN=-1.0 if back else 1.0, HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(size // 2),
        )  # fmt: skip
    return out
