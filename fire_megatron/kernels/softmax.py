"""What a loss and sampling need of a softmax over a vocabulary, each logit read once.

Shapes: C rows, V columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096
"""Columns at a time."""
FLOOR = tl.constexpr(-1.0e30)
"""Stands for the log of 0."""


@triton.jit
def _sums(logits, peaks, totals, moments, columns, stride, least, inverse_temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    # A number for each lane, which are put together once.
    peak = tl.full([BLOCK], 0.0, tl.float32) + least
    total, moment = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        highest = tl.maximum(peak, x)
        drop = tl.maximum((peak - highest) * inverse_temperature, FLOOR)  # times a total that may be 0
        kept = tl.exp(drop)
        shifted = tl.maximum((x - highest) * inverse_temperature, FLOOR)  # -inf * 0 would be NaN
        weight = tl.exp(shifted)
        moment = kept * (moment + drop * total) + weight * shifted
        total = kept * total + weight
        peak = highest
    highest = tl.max(peak, 0)
    drop = tl.maximum((peak - highest) * inverse_temperature, FLOOR)
    kept = tl.exp(drop)
    tl.store(peaks + row, highest)
    tl.store(totals + row, tl.sum(kept * total, 0))
    tl.store(moments + row, tl.sum(kept * (moment + drop * total), 0))


def softmax_sums(logits_CV: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each row's peak logit, the sum of its weights and the sum of weight x shifted logit, where ``shifted`` is
    (logit - peak) / temperature and a weight its exponential.

    Args:
        logits_CV: [C, V] float32 or half precision, contiguous in V; ``-inf`` has weight 0.

    Returns:
        [C] float32 each; the peak is finite where all are ``-inf`` too.
    """
    assert logits_CV.stride(1) == 1 or logits_CV.shape[1] <= 1, logits_CV.stride()
    rows, columns = logits_CV.shape
    peak, total, moment = torch.empty(3, rows, dtype=torch.float32, device=logits_CV.device).unbind()
    if rows:
        _sums[(rows,)](
            logits_CV, peak, total, moment, columns, logits_CV.stride(0), torch.finfo(torch.float32).min,
            1 / temperature, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return peak, total, moment


@triton.jit
def _gradient(
    logits, out, target, peaks, log_totals, entropies, of_log_prob, of_entropy, columns, stride, stride_out, first,
    WITH_LOG_PROB: tl.constexpr, WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(logits + row * stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    log_prob = tl.maximum(x - tl.load(peaks + row), FLOOR) - tl.load(log_totals + row)
    factor = tl.zeros([BLOCK], tl.float32)
    if WITH_ENTROPY:
        factor -= tl.load(of_entropy + row) * (log_prob + tl.load(entropies + row))
    if WITH_LOG_PROB:
        factor -= tl.load(of_log_prob + row)
    grad = tl.exp(log_prob) * factor
    if WITH_LOG_PROB:
        grad += tl.where(column + first == tl.load(target + row), tl.load(of_log_prob + row), 0.0)
    tl.store(out + row * stride_out + column, grad.to(out.dtype.element_ty), mask=inside)


def log_prob_and_entropy_gradient(
    logits_CV: torch.Tensor,
    out_CV: torch.Tensor,
    target_C: torch.Tensor,
    *,
    vocab_start: int,
    peak_C: torch.Tensor,
    log_total_C: torch.Tensor,
    entropy_C: torch.Tensor,
    grad_log_prob_C: torch.Tensor | None,
    grad_entropy_C: torch.Tensor | None,
) -> None:
    """Write the gradient of logits: ``g ([v = y] - p_v) - h p_v (log p_v + H)``.

    Args:
        logits_CV: [C, V] float32 or half precision, contiguous in V.
        out_CV: [C, V] where to; may be the logits' own memory.
        target_C: [C] int64 ids in the whole vocabulary, whose first column here is ``vocab_start``.
        peak_C, log_total_C, entropy_C: [C] float32 of the whole vocabulary.
        grad_log_prob_C, grad_entropy_C: [C] float32 g and h; None for 0.
    """
    assert logits_CV.stride(1) == out_CV.stride(1) == 1 or logits_CV.shape[1] <= 1
    rows, columns = logits_CV.shape
    g, h = (peak_C if grad is None else grad.contiguous() for grad in (grad_log_prob_C, grad_entropy_C))
    if rows and columns:
        _gradient[(rows, triton.cdiv(columns, _BLOCK))](
            logits_CV, out_CV, target_C, peak_C, log_total_C, entropy_C, g, h,
            columns, logits_CV.stride(0), out_CV.stride(0), vocab_start,
            WITH_LOG_PROB=grad_log_prob_C is not None, WITH_ENTROPY=grad_entropy_C is not None,
            BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip


@triton.jit
def _block_masses(logits, out, peaks, columns, blocks, stride, temperature, SIZE: tl.constexpr, BLOCKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(logits + row * stride + column, mask=column < columns, other=float("-inf")).to(tl.float32)
    mass = tl.exp((x - tl.load(peaks + row)) / temperature)
    tl.store(out + row * blocks + block, tl.sum(mass.to(tl.float64), 1), mask=block < blocks)


def block_masses(logits_CV: torch.Tensor, peak_C: torch.Tensor, temperature: float, size: int) -> torch.Tensor:
    """Sums of ``exp((logit - peak) / temperature)`` over blocks of columns.

    Args:
        logits_CV: [C, V] float32 or half precision, contiguous in V.
        peak_C: [C] float32, finite.
        size: columns of a block, a power of 2; the last may have fewer.

    Returns:
        [C, blocks] float64.
    """
    rows, columns = logits_CV.shape
    blocks, together = triton.cdiv(columns, size), max(1, _BLOCK // size)
    out = torch.empty(rows, blocks, dtype=torch.float64, device=logits_CV.device)
    if rows:
        _block_masses[(rows, triton.cdiv(blocks, together))](
            logits_CV, out, peak_C, columns, blocks, logits_CV.stride(0), temperature,
            SIZE=size, BLOCKS=together, num_warps=8,
        )  # fmt: skip
    return out
