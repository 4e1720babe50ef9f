"""Log-probability and entropy of a softmax whose vocabulary is sharded over the tensor-parallel group.

Shapes: T tokens, V local vocabulary, C tokens of a block. A rank holds vocabulary entries
``[vocab_start, vocab_start + V)``; V may differ from rank to rank, and be 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from fire_megatron import kernels
from fire_megatron.losses.softmax import (
    FLOOR,
    all_reduce,
    blocks,
    compute_dtype,
    gather_local,
    local_columns,
    local_peak,
    log_softmax,
    shifted,
)


def log_prob_and_entropy(
    logits_TV: torch.Tensor,
    target_T: torch.Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    with_entropy: bool = True,
    block_tokens: int | None = None,
    reuse_logits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of each target and entropy of each full next-token distribution, with autograd for both.

    Collectives: one max and one packed sum all-reduce over ``group`` in forward, none in backward. Saved for
    backward: the logits, the targets and three statistics a token. Extra memory: one block in float32 (two with
    the entropy), and in backward the gradient itself. The input is never changed (but see ``reuse_logits``).

    A padded vocabulary column carries ``-inf`` or the dtype's minimum: its probability, its part of the entropy
    and its gradient are exactly 0.

    Args:
        logits_TV: [T, V] this rank's shard; float32, bfloat16, float16, or float64 (then computed in float64).
        target_T: [T] int64 ids in the whole vocabulary. A target that no shard holds gives NaN, and one on a
            padded column ``-inf``: both are our own mistakes, made visible without a device synchronisation.
        group: the tensor-parallel ranks, which all pass the same targets; None when V is the whole vocabulary.
        vocab_start: vocabulary id of this shard's first column.
        with_entropy: whether to compute the entropy; without it the second result is None.
        block_tokens: tokens computed at a time; None picks a size for the device.
        reuse_logits: let backward write the gradient over the logits, for a caller who owns them.

    Returns:
        ``(log_prob_T, entropy_T)``, float32 (float64 for float64 logits), in nats; the same on every rank.
        The gradient with respect to the logits has the logits' dtype.
    """
    assert logits_TV.dim() == 2 and target_T.shape == logits_TV.shape[:1], (logits_TV.shape, target_T.shape)
    return _LogProbAndEntropy.apply(logits_TV, target_T, group, vocab_start, with_entropy, block_tokens, reuse_logits)


@torch.no_grad()
def score_log_prob_and_entropy(
    logits_TV: torch.Tensor,
    target_T: torch.Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    block_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`log_prob_and_entropy` for scoring: both results, nothing saved for backward."""
    _, log_prob_T, _, entropy_T = _statistics(
        logits_TV, target_T, group=group, vocab_start=vocab_start, with_entropy=True, block_tokens=block_tokens
    )
    return log_prob_T, entropy_T.clamp_min(0)


def _local_sums(
    logits_TV: torch.Tensor, with_entropy: bool, block_tokens: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One pass over this shard: its peak logit, sum of weights, and sum of weight x shifted logit. [T] each.

    Weights are exp(logit - peak of this shard). The third sum is 0 when there is no entropy to compute.
    """
    if kernels.usable(logits_TV):
        from fire_megatron.kernels.softmax import softmax_sums

        return softmax_sums(logits_TV)
    peak_T, total_T, moment_T = logits_TV.new_zeros(3, len(logits_TV), dtype=compute_dtype(logits_TV)).unbind()
    for part in blocks(logits_TV, block_tokens):
        peak_T[part] = peak_C = local_peak(logits_TV[part])
        shifted_CV = shifted(logits_TV[part], peak_C, 1.0)
        if with_entropy:
            weight_CV = shifted_CV.exp()
            total_T[part] = weight_CV.sum(-1)
            moment_T[part] = weight_CV.mul_(shifted_CV).sum(-1)
        else:
            total_T[part] = shifted_CV.exp_().sum(-1)
    return peak_T, total_T, moment_T


def _statistics(
    logits_TV: torch.Tensor,
    target_T: torch.Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    with_entropy: bool,
    block_tokens: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Global peak logit, log-probability, log of the sum of exp(logit - peak), entropy. [T] each.

    The peak and the log-sum stay apart because their sum would round away the log-sum of large logits.
    """
    local_peak_T, total_T, moment_T = _local_sums(logits_TV, with_entropy, block_tokens)
    peak_T = local_peak_T.clone()
    all_reduce(peak_T, dist.ReduceOp.MAX, group)
    # Rescale this shard's sums from its own peak to the global one.
    shift_T = (local_peak_T - peak_T).clamp_min_(FLOOR)
    scale_T = shift_T.exp()
    logit_T1, here_T1 = gather_local(logits_TV, target_T[:, None], vocab_start)
    here_T = here_T1.squeeze(-1)
    rows = [scale_T * total_T, torch.where(here_T, logit_T1.squeeze(-1) - peak_T, 0), here_T.to(peak_T.dtype)]
    if with_entropy:
        rows.append(scale_T * (moment_T + shift_T * total_T))
    sums = torch.stack(rows)
    all_reduce(sums, dist.ReduceOp.SUM, group)
    log_total_T = sums[0].log()
    log_prob_T = torch.where(sums[2] == 1, sums[1] - log_total_T, torch.nan)
    entropy_T = log_total_T - sums[3] / sums[0] if with_entropy else log_total_T
    return peak_T, log_prob_T, log_total_T, entropy_T


class _LogProbAndEntropy(torch.autograd.Function):
    """Closed form: with p the softmax and H its entropy,
    d log p_y / d logit_v = [v = y] - p_v and d H / d logit_v = -p_v (log p_v + H)."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: torch.Tensor,
        target_T: torch.Tensor,
        group: dist.ProcessGroup | None,
        vocab_start: int,
        with_entropy: bool,
        block_tokens: int | None,
        reuse_logits: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        peak_T, log_prob_T, log_total_T, entropy_T = _statistics(
            logits_TV,
            target_T,
            group=group,
            vocab_start=vocab_start,
            with_entropy=with_entropy,
            block_tokens=block_tokens,
        )
        ctx.set_materialize_grads(False)
        ctx.vocab_start, ctx.block_tokens, ctx.reuse_logits = vocab_start, block_tokens, reuse_logits
        ctx.save_for_backward(logits_TV, target_T, peak_T, log_total_T, entropy_T)
        # Rounding can leave the entropy of a one-hot distribution just below 0.
        return log_prob_T, entropy_T.clamp_min(0) if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_prob_T: torch.Tensor | None, grad_entropy_T: torch.Tensor | None) -> tuple:
        if grad_log_prob_T is None and grad_entropy_T is None:
            return (None,) * 7
        logits_TV, target_T, peak_T, log_total_T, entropy_T = ctx.saved_tensors
        grad_TV = logits_TV if ctx.reuse_logits else torch.empty_like(logits_TV)
        if kernels.usable(logits_TV):
            from fire_megatron.kernels.softmax import log_prob_and_entropy_gradient

            log_prob_and_entropy_gradient(
                logits_TV,
                grad_TV,
                target_T,
                vocab_start=ctx.vocab_start,
                peak_C=peak_T,
                log_total_C=log_total_T,
                entropy_C=entropy_T,
                grad_log_prob_C=grad_log_prob_T,
                grad_entropy_C=grad_entropy_T,
            )
            return grad_TV, None, None, None, None, None, None
        for part in blocks(logits_TV, ctx.block_tokens) if logits_TV.shape[-1] else ():
            log_prob_CV = log_softmax(logits_TV[part], peak_T[part], log_total_T[part], 1.0)
            if grad_entropy_T is None:
                weighted_CV = log_prob_CV.exp_().mul_(-grad_log_prob_T[part, None])
            else:
                p_CV = log_prob_CV.exp()
                factor_CV = log_prob_CV.add_(entropy_T[part, None]).mul_(-grad_entropy_T[part, None])
                if grad_log_prob_T is not None:
                    factor_CV.sub_(grad_log_prob_T[part, None])
                weighted_CV = factor_CV.mul_(p_CV)
            if grad_log_prob_T is not None:
                column_C, here_C = local_columns(target_T[part], ctx.vocab_start, logits_TV.shape[-1])
                weighted_CV.scatter_add_(-1, column_C[:, None], (grad_log_prob_T[part] * here_C)[:, None])
            grad_TV[part] = weighted_CV
        return grad_TV, None, None, None, None, None, None
