"""Log-probability and entropy of a softmax whose vocabulary is sharded over the tensor-parallel group.

Shapes: T tokens, V local vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

CHUNK_TOKENS = 512
"""Tokens whose float32 copy exists at a time; bounds the extra memory to CHUNK_TOKENS x V."""


def _accumulation_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _all_reduce(values: torch.Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(values, op=op, group=group)


def _local_targets(targets: torch.Tensor, vocab_start: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each target in this shard (0 when elsewhere) and whether it is here. [T] each."""
    local = targets - vocab_start
    here = (local >= 0) & (local < width)
    return local.clamp(0, max(width - 1, 0)), here


def _statistics(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    with_entropy: bool,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-sum-exp, log-probability and entropy, [T] each. Two all-reduces: one max, one packed sum."""
    dtype = _accumulation_dtype(logits)
    tokens, width = logits.shape
    peak = logits.new_full((tokens,), float("-inf"), dtype=dtype)
    if width and tokens:
        peak = logits.amax(-1).to(dtype)
    _all_reduce(peak, dist.ReduceOp.MAX, group)
    columns, here = _local_targets(targets, vocab_start, width)
    # Rows of sums: sum of exponentials, target's shifted logit, sum of exponential times shifted logit.
    sums = torch.zeros(3, tokens, dtype=dtype, device=logits.device)
    for start in range(0, tokens, chunk):
        part = slice(start, start + chunk)
        shifted = logits[part].to(dtype) - peak[part, None]
        sums[1, part] = torch.where(here[part], shifted.gather(-1, columns[part, None]).squeeze(-1), 0.0)
        weight = shifted.exp()
        sums[0, part] = weight.sum(-1)
        if with_entropy:
            # A padded column is -inf with weight 0, and 0 * -inf is NaN: clamp it to a finite number first.
            sums[2, part] = (weight * shifted.clamp_min_(torch.finfo(dtype).min)).sum(-1)
    _all_reduce(sums, dist.ReduceOp.SUM, group)
    log_norm = sums[0].log()
    return peak + log_norm, sums[1] - log_norm, log_norm - sums[2] / sums[0]


class _LogProbAndEntropy(torch.autograd.Function):
    """Closed-form gradients from the saved log-sum-exp and entropy: no collective and no softmax kept.

    d log p_y / d z_v = [v = y] - p_v        dH / d z_v = -p_v (log p_v + H)
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        group: dist.ProcessGroup | None,
        vocab_start: int,
        with_entropy: bool,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_norm, log_prob, entropy = _statistics(
            logits, targets, group=group, vocab_start=vocab_start, with_entropy=with_entropy, chunk=chunk
        )
        ctx.save_for_backward(logits, targets, log_norm, entropy)
        ctx.vocab_start, ctx.chunk = vocab_start, chunk
        ctx.set_materialize_grads(False)
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return log_prob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        logits, targets, log_norm, entropy = ctx.saved_tensors
        grad_log_prob, grad_entropy = grads
        if grad_log_prob is None and grad_entropy is None:
            return None, None, None, None, None, None
        dtype = log_norm.dtype
        columns, here = _local_targets(targets, ctx.vocab_start, logits.shape[-1])
        result = torch.empty_like(logits)
        for start in range(0, logits.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            log_p = logits[part].to(dtype) - log_norm[part, None]
            grad = log_p.exp()
            if grad_entropy is None:
                grad.mul_(-grad_log_prob[part, None])
            else:
                # Where p is 0, log p is -inf: finite times 0 is the limit p log p -> 0.
                factor = log_p.clamp_min_(torch.finfo(dtype).min).add_(entropy[part, None])
                factor.mul_(-grad_entropy[part, None])
                if grad_log_prob is not None:
                    factor.sub_(grad_log_prob[part, None])
                grad.mul_(factor)
            if grad_log_prob is not None:
                own = torch.where(here[part], grad_log_prob[part], 0.0)
                grad.scatter_add_(-1, columns[part, None], own[:, None])
            result[part] = grad.to(logits.dtype)
        return result, None, None, None, None, None


def log_prob_and_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    with_entropy: bool = True,
    chunk: int = CHUNK_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of each distribution, differentiable in the logits.

    Args:
        logits: [T, V] float32, bfloat16 or float64, this rank's vocabulary shard; ``-inf`` in padding columns,
            which get no probability and no gradient. Never changed.
        targets: [T] int64 global token ids. A target on a padding column or outside the vocabulary is a mistake of
            the caller; it is not checked, since that would wait for the device.
        group: tensor-parallel group; None for an unsharded vocabulary.
        vocab_start: first vocabulary entry of this shard.
        with_entropy: False saves the work; the second result is then meaningless.
        chunk: tokens whose accumulation-precision copy exists at a time.

    Returns:
        log-probability and entropy (nats), [T] each, float32 (float64 for float64 logits), the same on every rank.

    Collectives: one max and one sum of [3, T] in forward, none in backward. Saved for backward: the logits, and
    log-sum-exp and entropy, [T] each. The gradient has the logits' dtype.
    """
    return _LogProbAndEntropy.apply(logits, targets, group, vocab_start, with_entropy, chunk)


@torch.no_grad()
def score_log_prob_and_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    chunk: int = CHUNK_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`log_prob_and_entropy` for scoring: nothing is saved for a backward pass."""
    _, log_prob, entropy = _statistics(
        logits, targets, group=group, vocab_start=vocab_start, with_entropy=True, chunk=chunk
    )
    return log_prob, entropy
