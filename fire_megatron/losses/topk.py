"""The divergence on the teacher's top-k tokens and one bucket for the rest, over a sharded vocabulary.

Both distributions are summed into the same k + 1 buckets, so that it is a true divergence: it is 0 only where the
buckets agree, and it never exceeds the divergence over the whole vocabulary (data processing inequality).

Shapes: T tokens, V columns of this shard, C tokens of a block, K the teacher's top-k, S shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from fire_megatron.losses.divergences import Divergence
from fire_megatron.losses.softmax import (
    FLOOR,
    all_reduce,
    blocks,
    combine,
    compute_dtype,
    gather_local,
    local_columns,
    local_peak,
    log_softmax,
    shifted,
)
from fire_megatron.parallel.collectives import all_gather_stacked


@dataclass(frozen=True)
class TopK:
    """The likeliest tokens of each distribution."""

    ids_TK: torch.Tensor
    """[T, K] int64 ids in the whole vocabulary, likeliest first, the smaller id first among equals."""
    log_prob_TK: torch.Tensor
    """[T, K] float32, nats."""
    tail_log_prob_T: torch.Tensor
    """[T] float32, log of the probability of all other tokens, summed over them and not taken as what is left of 1;
    -1e30 where there is none."""

    def __post_init__(self) -> None:
        assert self.ids_TK.shape == self.log_prob_TK.shape and len(self.ids_TK) == len(self.tail_log_prob_T)

    def __getitem__(self, part: slice) -> TopK:
        return TopK(self.ids_TK[part], self.log_prob_TK[part], self.tail_log_prob_T[part])


def _sort_keys(logits_CV: torch.Tensor, vocab_start: int) -> torch.Tensor:
    """[C, V] int64 that order as the logits do, and equals by id, the smaller first: so that the choice among equal
    logits, of which bfloat16 has many, is the same however the vocabulary is sharded."""
    # Adding 0 turns -0 into 0, which must not order below it.
    bits = (logits_CV.float() + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids = torch.arange(vocab_start, vocab_start + logits_CV.shape[-1], device=logits_CV.device)
    return (ordered.long() << 32) + (2**31 - ids)


def _key_ids(keys: torch.Tensor) -> torch.Tensor:
    """The ids in :func:`_sort_keys`."""
    return 2**31 - (keys & 0xFFFFFFFF)


@torch.no_grad()
def top_k(
    logits_TV: torch.Tensor,
    k: int,
    *,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    temperature: float = 1.0,
    block_tokens: int | None = None,
) -> TopK:
    """Find the k likeliest tokens over all shards.

    Collectives: two all-gathers, of K int64 and of K + 2 floats a token. Without gradient; the logits are not changed.

    Args:
        logits_TV: [T, V] this rank's shard, float32, bfloat16 or float16.
        k: at most the size of the vocabulary.
        group: the ranks that hold the other shards; None when V is the whole vocabulary.
        vocab_start: vocabulary id of this shard's first column.
        temperature: divides the logits.
        block_tokens: tokens computed at a time; None picks a size for the device.

    Returns:
        The same on every rank.
    """
    tokens, width = logits_TV.shape
    near = min(k, width)
    keys_TK = torch.full((tokens, k), torch.iinfo(torch.int64).min, device=logits_TV.device)
    # The candidates' logits, then peak and log-sum of the shard's other columns.
    floats_TF = logits_TV.new_full((tokens, k + 2), -torch.inf, dtype=torch.float32)
    for part in blocks(logits_TV, block_tokens):
        keys_TK[part, :near] = keys_CK = _sort_keys(logits_TV[part], vocab_start).topk(near, -1).values
        columns_CK = _key_ids(keys_CK) - vocab_start
        others_CV = logits_TV[part].to(torch.float32, copy=True)
        floats_TF[part, :near] = others_CV.gather(-1, columns_CK)
        others_CV.scatter_(-1, columns_CK, -torch.inf)
        floats_TF[part, k] = peak_C = local_peak(others_CV)
        floats_TF[part, k + 1] = shifted(others_CV, peak_C, temperature).exp_().sum(-1).log()
    # Candidates of all shards side by side, best first.
    keys, order = all_gather_stacked(keys_TK, group=group).permute(1, 0, 2).flatten(1).sort(-1, descending=True)
    floats_STF = all_gather_stacked(floats_TF, group=group)
    candidates = floats_STF[..., :k].permute(1, 0, 2).flatten(1).gather(-1, order)
    peak_T = candidates[:, 0]
    listed = ((candidates - peak_T[:, None]) / temperature).clamp_min(FLOOR)
    rest_ST = ((floats_STF[..., k] - peak_T) / temperature + floats_STF[..., k + 1]).clamp_min(FLOOR)
    tail_T = torch.cat((listed[:, k:], rest_ST.t()), -1).logsumexp(-1)
    listed_TK = listed[:, :k]
    log_total_T = torch.logaddexp(listed_TK.logsumexp(-1), tail_T)
    return TopK(_key_ids(keys[:, :k]), listed_TK - log_total_T[:, None], (tail_T - log_total_T).clamp_min(FLOOR))


@dataclass(frozen=True)
class _Options:
    kind: Divergence
    group: dist.ProcessGroup | None
    vocab_start: int
    temperature: float
    block_tokens: int | None
    reuse_logits: bool


def topk_divergence(
    student_logits_TV: torch.Tensor,
    teacher: TopK,
    *,
    kind: Divergence,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    temperature: float = 1.0,
    mask_T: torch.Tensor | None = None,
    block_tokens: int | None = None,
    reuse_logits: bool = False,
) -> torch.Tensor:
    """Divergence over the teacher's top-k tokens and the rest, differentiable with respect to the student's logits.

    Collectives: one all-gather of four numbers a token, one all-reduce of K + 1; none in backward. Saved for backward:
    the logits given and, per token, peak, log-sum and K + 1 numbers of the buckets. Extra memory: the float32 copies
    of one block, and in backward the gradient.

    Args:
        student_logits_TV: [T, V] this rank's shard; float32, bfloat16, float16, or float64 (then computed in float64).
        teacher: the teacher's, the same on every rank of the group; from :func:`top_k`, which has applied its
            temperature.
        vocab_start: vocabulary id of this shard's first column.
        kind, group, temperature, mask_T, block_tokens: see
            :func:`fire_megatron.losses.vocab_divergence.divergence`.
        reuse_logits: let backward write the gradient over ``student_logits_TV``, for a caller who owns them.

    Returns:
        [T] float32 (float64 for float64 logits), nats, at least 0; the same on every rank of the group. The gradient
        has the student's dtype. A listed id that no shard holds gives NaN: our own mistake, made visible.
    """
    assert student_logits_TV.dim() == 2 and len(teacher.ids_TK) == len(student_logits_TV)
    options = _Options(kind, group, vocab_start, temperature, block_tokens, reuse_logits)
    log_t = torch.cat((teacher.log_prob_TK, teacher.tail_log_prob_T[:, None]), -1)
    log_t = log_t.to(compute_dtype(student_logits_TV)).clamp_min(FLOOR)
    return _TopKDivergence.apply(student_logits_TV, options, mask_T, teacher.ids_TK, log_t)


def _lower_listed(values_CV: torch.Tensor, column_CK: torch.Tensor, here_CK: torch.Tensor, to: float) -> torch.Tensor:
    """Set the listed columns that are here to the lowest value there is, in place."""
    if values_CV.shape[-1]:
        # A minimum, since columns that are elsewhere point at an arbitrary one, which must stay as it is.
        source = torch.where(here_CK, to, torch.inf).to(values_CV.dtype)
        values_CV.scatter_reduce_(-1, column_CK, source, "amin")
    return values_CV


class _TopKDivergence(torch.autograd.Function):
    """d D / d logit_v = h_j - s_j sum h for a token v with a bucket j of its own, and for the others that of the tail's
    bucket times the token's share of the tail, over temperature; see losses/divergences.py for h."""

    @staticmethod
    def forward(
        ctx: Any,
        student_TV: torch.Tensor,
        options: _Options,
        mask_T: torch.Tensor | None,
        ids_TK: torch.Tensor,
        log_t_TK1: torch.Tensor,
    ) -> torch.Tensor:
        (tokens, width), group, dtype = student_TV.shape, options.group, compute_dtype(student_TV)
        column_TK, here_TK = local_columns(ids_TK, options.vocab_start, width)
        # Two rows: all columns, and those without a bucket of their own. The tail has a peak of its own, since next to
        # that of the whole it may underflow.
        peak_2T, total_2T = student_TV.new_zeros(2, 2, tokens, dtype=dtype).unbind()
        for part in blocks(student_TV, options.block_tokens):
            tail_CV = student_TV[part].to(dtype, copy=True)
            for row in range(2):
                if row == 1:
                    _lower_listed(tail_CV, column_TK[part], here_TK[part], -torch.inf)
                peak_2T[row, part] = peak_C = local_peak(tail_CV)
                total_2T[row, part] = shifted(tail_CV, peak_C, options.temperature).exp_().sum(-1)
        peak_2T, totals = combine(peak_2T, total_2T[None], options.temperature, group)
        (peak_T, tail_peak_T), (log_total_T, tail_log_total_T) = peak_2T, totals[0].log()
        log_tail_T = (tail_peak_T - peak_T) / options.temperature + tail_log_total_T - log_total_T
        logit_TK, _ = gather_local(student_TV, ids_TK, options.vocab_start)
        log_s_TK = ((logit_TK - peak_T[:, None]) / options.temperature).clamp_min(FLOOR) - log_total_T[:, None]
        log_s_TK = torch.where(here_TK, log_s_TK, 0)
        found = torch.cat((log_s_TK, here_TK.sum(-1, keepdim=True, dtype=dtype)), -1)
        all_reduce(found, dist.ReduceOp.SUM, group)
        log_s_TK, count_T = found[:, :-1], found[:, -1]
        log_s_TK1 = torch.cat((log_s_TK, log_tail_T[:, None].clamp_min(FLOOR)), -1)
        s_TK1 = log_s_TK1.exp()
        terms = options.kind.terms(log_s_TK1, s_TK1, log_t_TK1.clone(), log_t_TK1.exp())
        buckets_TK1 = terms.h_CV - s_TK1 * terms.inner_C[:, None]
        # Relative to the tail itself, since next to the whole it may underflow. Where there is none, no share.
        no_tail_T = tail_log_total_T == -torch.inf
        tail_peak_T = torch.where(no_tail_T, peak_T, tail_peak_T)
        tail_log_total_T = tail_log_total_T.masked_fill(no_tail_T, torch.inf)
        ctx.options = options
        ctx.save_for_backward(student_TV, mask_T, ids_TK, tail_peak_T, tail_log_total_T, buckets_TK1)
        value_T = terms.value_C.clamp_min(0)  # rounding can leave equal distributions just below
        value_T = value_T.masked_fill(count_T != ids_TK.shape[-1], torch.nan)
        return value_T if mask_T is None else value_T.masked_fill(~mask_T, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple:
        student_TV, mask_T, ids_TK, tail_peak_T, tail_log_total_T, buckets_TK1 = ctx.saved_tensors
        options, width = ctx.options, student_TV.shape[-1]
        grad_TV = student_TV if options.reuse_logits else torch.empty_like(student_TV)
        column_TK, here_TK = local_columns(ids_TK, options.vocab_start, width)
        scale_T = grad_T / options.temperature
        for part in blocks(student_TV, options.block_tokens) if width else ():
            column_CK, here_CK = column_TK[part], here_TK[part]
            log_share_CV = log_softmax(student_TV[part], tail_peak_T[part], tail_log_total_T[part], options.temperature)
            grad_CV = _lower_listed(log_share_CV.exp_(), column_CK, here_CK, 0.0).mul_(buckets_TK1[part, -1:])
            grad_CV.scatter_add_(-1, column_CK, buckets_TK1[part, :-1] * here_CK).mul_(scale_T[part, None])
            if mask_T is not None:
                grad_CV.masked_fill_(~mask_T[part, None], 0)
            grad_TV[part] = grad_CV
        return grad_TV, None, None, None, None
