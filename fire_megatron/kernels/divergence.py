"""A divergence over a vocabulary and its gradient, from the logits of both sides; see losses/divergences.py.

Shapes: C tokens, V columns of this shard.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fire_megatron.kernels.softmax import FLOOR

_BLOCK = 2048
"""Columns at a time."""
_TINY = tl.constexpr(1.1754943508222875e-38)
"""What a mixture is at least: the smallest normal number."""
_REVERSE, _FORWARD, _JENSEN_SHANNON, _SKEWED_FORWARD, _SKEWED_REVERSE = (tl.constexpr(i) for i in range(5))
KINDS = {
    "reverse_kl": 0, "forward_kl": 1, "jensen_shannon": 2, "skewed_forward_kl": 3, "skewed_reverse_kl": 4,
}  # fmt: skip


@triton.jit
def _log_probs(logits, peak, inverse_temperature, log_total, inside):
    x = tl.load(logits, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.maximum((x - peak) * inverse_temperature, FLOOR) - log_total


@triton.jit
def _terms(log_s, log_t, parameter, KIND: tl.constexpr):
    """f, h and the student's probabilities of each entry."""
    s, t = tl.exp(log_s), tl.exp(log_t)
    if KIND == _REVERSE:
        f = s * (log_s - log_t)
        h = f
    elif KIND == _FORWARD:
        f = t * (log_t - log_s)
        h = -t
    elif KIND == _JENSEN_SHANNON:
        log_m = tl.log(tl.maximum(s + parameter * (t - s), _TINY))
        h = (1 - parameter) * s * (log_s - log_m)
        f = parameter * t * (log_t - log_m) + h
    elif KIND == _SKEWED_FORWARD:
        m = tl.maximum(s + parameter * (t - s), _TINY)
        f = t * (log_t - tl.log(m))
        h = (parameter - 1) * (s * t / m)
    else:
        m = tl.maximum(t + parameter * (s - t), _TINY)
        f = s * (log_s - tl.log(m))
        h = f - parameter * (s * s / m)
    return f, h, s


@triton.jit
def _sums(
    student, teacher, peaks, log_totals, out, rows, columns, stride_s, stride_t, inverse_s, inverse_t, parameter,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    peak_s, peak_t = tl.load(peaks + row), tl.load(peaks + rows + row)
    total_s, total_t = tl.load(log_totals + row), tl.load(log_totals + rows + row)
    value, inner = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        log_s = _log_probs(student + row * stride_s + column, peak_s, inverse_s, total_s, inside)
        log_t = _log_probs(teacher + row * stride_t + column, peak_t, inverse_t, total_t, inside)
        f, h, _ = _terms(log_s, log_t, parameter, KIND)
        value += f
        inner += h
    tl.store(out + row, tl.sum(value, 0))
    tl.store(out + rows + row, tl.sum(inner, 0))


@triton.jit
def _gradient(
    student, teacher, peaks, log_totals, inners, scales, out, rows, columns, stride_s, stride_t, stride_out,
    inverse_s, inverse_t, parameter, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    peak_s, peak_t = tl.load(peaks + row), tl.load(peaks + rows + row)
    total_s, total_t = tl.load(log_totals + row), tl.load(log_totals + rows + row)
    log_s = _log_probs(student + row * stride_s + column, peak_s, inverse_s, total_s, inside)
    log_t = _log_probs(teacher + row * stride_t + column, peak_t, inverse_t, total_t, inside)
    _, h, s = _terms(log_s, log_t, parameter, KIND)
    grad = (h - s * tl.load(inners + row)) * tl.load(scales + row)
    tl.store(out + row * stride_out + column, grad.to(out.dtype.element_ty), mask=inside)


def divergence_sums(
    student_CV: torch.Tensor,
    teacher_CV: torch.Tensor,
    peak_2C: torch.Tensor,
    log_total_2C: torch.Tensor,
    *,
    kind: str,
    parameter: float,
    temperatures: tuple[float, float],
) -> torch.Tensor:
    """This shard's sums of f and of h.

    Args:
        student_CV, teacher_CV: [C, V] logits, float32 or half precision, contiguous in V.
        peak_2C: [2, C] float32, the student's and the teacher's peak logit over the whole vocabulary.
        log_total_2C: [2, C] float32, log of the sum of exp((logit - peak) / temperature) over it.
        kind, parameter: of the divergence.
        temperatures: the student's and the teacher's.

    Returns:
        [2, C] float32.
    """
    rows, columns = student_CV.shape
    out = torch.zeros(2, rows, dtype=torch.float32, device=student_CV.device)
    if rows and columns:
        _sums[(rows,)](
            student_CV, teacher_CV, peak_2C.contiguous(), log_total_2C.contiguous(), out, rows, columns,
            student_CV.stride(0), teacher_CV.stride(0), *(1 / x for x in temperatures), parameter,
            KIND=KINDS[kind], BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return out


def divergence_gradient(
    student_CV: torch.Tensor,
    teacher_CV: torch.Tensor,
    peak_2C: torch.Tensor,
    log_total_2C: torch.Tensor,
    inner_C: torch.Tensor,
    scale_C: torch.Tensor,
    out_CV: torch.Tensor,
    *,
    kind: str,
    parameter: float,
    temperatures: tuple[float, float],
) -> None:
    """Write ``scale (h - s inner)``; see :func:`divergence_sums`.

    Args:
        inner_C: [C] float32, the sum of h over the whole vocabulary.
        scale_C: [C] float32.
        out_CV: [C, V] where to; may be the student's own memory.
    """
    rows, columns = student_CV.shape
    if rows and columns:
        _gradient[(rows, triton.cdiv(columns, _BLOCK))](
            student_CV, teacher_CV, peak_2C.contiguous(), log_total_2C.contiguous(), inner_C.contiguous(),
            scale_C.contiguous(), out_CV, rows, columns, student_CV.stride(0), teacher_CV.stride(0), out_CV.stride(0),
            *(1 / x for x in temperatures), parameter, KIND=KINDS[kind], BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
