"""Exact divergences between a student and its teacher over a sharded vocabulary, with closed-form gradients.

Shapes: T tokens, V columns of this shard, C tokens of a block, M teachers of a mixture, D distributions to normalise
(the student's and those of the teachers). Student and teachers are sharded alike: column v of this rank is the same
vocabulary entry in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from fire_megatron import kernels
from fire_megatron.losses.divergences import Divergence, Terms
from fire_megatron.losses.softmax import (
    FLOOR,
    all_reduce,
    blocks,
    combine,
    compute_dtype,
    is_sharded,
    local_peak,
    shifted,
)


@dataclass(frozen=True)
class _Options:
    kind: Divergence
    group: dist.ProcessGroup | None
    temperature: float
    teacher_temperature: float
    by_log_prob: bool
    block_tokens: int | None
    reuse_logits: bool


def divergence(
    student_logits_TV: torch.Tensor,
    teacher_logits_TV: torch.Tensor | Sequence[torch.Tensor],
    *,
    kind: Divergence,
    group: dist.ProcessGroup | None,
    weight_TM: torch.Tensor | None = None,
    mixture: str = "distributions",
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    mask_T: torch.Tensor | None = None,
    block_tokens: int | None = None,
    reuse_logits: bool = False,
) -> torch.Tensor:
    """Divergence of the student's next-token distribution from its teacher's at every token, differentiable with
    respect to the student's logits.

    Collectives: one all-gather of two numbers a token and model, one all-reduce of two numbers a token; none in
    backward. Saved for backward: the logits given, and per token the peak and log-sum of each model and one sum.
    Extra memory: the float32 copies of one block, and in backward the gradient. The logits are never changed (but see
    ``reuse_logits``); ``-inf`` columns, which is what vocabulary padding holds, have probability and gradient 0.

    Args:
        student_logits_TV: [T, V] this rank's shard; float32, bfloat16, float16, or float64 (then computed in float64).
        teacher_logits_TV: [T, V] the teacher's, of any float dtype; or one such tensor for each of M teachers.
        kind: from :func:`fire_megatron.losses.divergences.build_divergence`.
        group: the ranks that hold the other shards; None when V is the whole vocabulary.
        weight_TM: [T, M] weight of each teacher at each token, summing to 1; not read with one teacher.
        mixture: what the weights mix: ``distributions`` (sum of w_k p_k) or ``log_probs`` (the normalised product of
            p_k^w_k).
        temperature: divides the student's logits.
        teacher_temperature: divides the teachers' logits.
        mask_T: [T] bool; where False the result and the gradient are 0, whatever the logits hold.
        block_tokens: tokens computed at a time; None picks a size for the device and V.
        reuse_logits: write the gradient over ``student_logits_TV``, already in forward, for a caller who owns them and
            does not need them again. Nothing else is then saved; backward can run once; the gradient of half-precision
            logits is rounded twice. Collectives are those above once a block, so over several ranks, whose V may
            differ, ``block_tokens`` must be given, alike on all.

    Returns:
        [T] float32 (float64 for float64 logits), nats, at least 0; the same on every rank of the group. The gradient
        has the student's dtype. An infinite divergence, where only the one that may not has a column of ``-inf``, is
        finite but of the order of 1e30.
    """
    teachers = [teacher_logits_TV] if isinstance(teacher_logits_TV, torch.Tensor) else list(teacher_logits_TV)
    assert teachers and all(t.shape == student_logits_TV.shape for t in teachers), [t.shape for t in teachers]
    assert (len(teachers) == 1) or (
        weight_TM is not None and weight_TM.shape == (len(student_logits_TV), len(teachers))
    )
    assert mixture in ("distributions", "log_probs"), mixture
    assert block_tokens or not (reuse_logits and is_sharded(group)), "ranks would cut blocks by their own width"
    options = _Options(
        kind, group, temperature, teacher_temperature, mixture == "log_probs", block_tokens, reuse_logits
    )
    if len(teachers) == 1 and kernels.usable(student_logits_TV) and kernels.usable(teachers[0]):
        return _DivergenceInOnePass.apply(student_logits_TV, options, mask_T, teachers[0].detach())
    weights = None if len(teachers) == 1 else weight_TM.to(compute_dtype(student_logits_TV))
    return _Divergence.apply(student_logits_TV, options, mask_T, weights, *(t.detach() for t in teachers))


class _DivergenceInOnePass(torch.autograd.Function):
    """:class:`_Divergence` from one teacher, by kernels: each side is read once for its normaliser, once for the sums
    and once for the gradient, which is written in backward also with ``reuse_logits``."""

    @staticmethod
    def forward(
        ctx: Any,
        student_TV: torch.Tensor,
        options: _Options,
        mask_T: torch.Tensor | None,
        teacher_TV: torch.Tensor,
    ) -> torch.Tensor:
        from fire_megatron.kernels.divergence import divergence_sums
        from fire_megatron.kernels.softmax import softmax_sums

        temperatures = options.temperature, options.teacher_temperature
        sides = [softmax_sums(x, t) for x, t in zip((student_TV, teacher_TV), temperatures, strict=True)]
        peak_2T, total_2T = (torch.stack([side[i] for side in sides]) for i in range(2))
        # Filled on the device: a copy from the host would wait for all that it still has to do.
        temperature_21 = torch.cat([total_2T.new_full((1, 1), t) for t in temperatures])
        peak_2T, totals = combine(peak_2T, total_2T[None], temperature_21, options.group)
        how = {"kind": options.kind.name, "parameter": options.kind.parameter, "temperatures": temperatures}
        log_total_2T = totals[0].log()
        sums_2T = divergence_sums(student_TV, teacher_TV, peak_2T, log_total_2T, **how)
        all_reduce(sums_2T, dist.ReduceOp.SUM, options.group)
        ctx.options, ctx.how = options, how
        ctx.save_for_backward(student_TV, teacher_TV, mask_T, peak_2T, log_total_2T, sums_2T[1])
        value_T = sums_2T[0].clamp_min(0)  # rounding can leave equal distributions just below
        return value_T if mask_T is None else value_T.masked_fill(~mask_T, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple:
        from fire_megatron.kernels.divergence import divergence_gradient

        student_TV, teacher_TV, mask_T, peak_2T, log_total_2T, inner_T = ctx.saved_tensors
        out_TV = student_TV if ctx.options.reuse_logits else torch.empty_like(student_TV)
        scale_T = grad_T / ctx.options.temperature
        divergence_gradient(student_TV, teacher_TV, peak_2T, log_total_2T, inner_T, scale_T, out_TV, **ctx.how)
        return out_TV if mask_T is None else out_TV.masked_fill_(~mask_T[:, None], 0), None, None, None


class _Distribution(NamedTuple):
    """One distribution's block while its normaliser is not known yet."""

    peak_C: torch.Tensor
    log_CV: torch.Tensor
    """Logits less this shard's peak, over the temperature."""
    weight_CV: torch.Tensor
    """Their exponentials."""


@dataclass(frozen=True)
class _Models:
    """The student and its teachers, as D distributions read block by block."""

    student_TV: torch.Tensor
    teachers_TV: tuple[torch.Tensor, ...]
    weight_TM: torch.Tensor | None
    options: _Options

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.student_TV)

    @property
    def distributions(self) -> int:
        """D: a product of distributions is normalised as one."""
        return 2 if self.options.by_log_prob else 1 + len(self.teachers_TV)

    def temperatures(self) -> list[float]:
        """[D]"""
        return [self.options.temperature] + [self.options.teacher_temperature] * (self.distributions - 1)

    def logits(self, part: slice) -> list[torch.Tensor]:
        """D logits [C, V] of a block; those that are no mixture are views."""
        teachers = [t[part] for t in self.teachers_TV]
        if self.options.by_log_prob and self.weight_TM is not None:
            # Logits differ from log-probabilities by a constant a token, which the normaliser takes out again.
            weights = self.weight_TM[part].unbind(-1)
            terms = (t.to(self.dtype).clamp_min(FLOOR) * w[:, None] for t, w in zip(teachers, weights, strict=True))
            teachers = [sum(terms)]
        return [self.student_TV[part], *teachers]

    def begin(self, part: slice) -> list[_Distribution]:
        """The normalisers' local parts of a block, D of them."""
        rows = []
        for logits, temperature in zip(self.logits(part), self.temperatures(), strict=True):
            if logits.dtype == torch.float64:
                logits = logits.to(self.dtype)  # a teacher's beside a float32 student
            peak_C = local_peak(logits).to(self.dtype)
            log_CV = shifted(logits, peak_C, temperature)
            rows.append(_Distribution(peak_C, log_CV, log_CV.exp()))
        return rows

    def finish(
        self, part: slice, rows: list[_Distribution], peak_DT: torch.Tensor, log_total_DT: torch.Tensor
    ) -> tuple[Terms, torch.Tensor]:
        """The divergence's terms of a block and the student's probabilities, from :meth:`begin` and the normalisers."""
        reads_t = self.options.kind.reads_t
        for r, (row, temperature) in enumerate(zip(rows, self.temperatures(), strict=True)):
            offset_C1 = ((peak_DT[r, part] - row.peak_C) / temperature + log_total_DT[r, part])[:, None]
            offset_C1.clamp_max_(-FLOOR)  # infinite for a shard without mass and a temperature below 1
            row.log_CV.sub_(offset_C1)
            if r == 0 or (reads_t and len(rows) == 2):
                row.weight_CV.mul_(offset_C1.neg_().exp_())
        log_t, t = rows[1].log_CV, rows[1].weight_CV
        if len(rows) > 2:
            log_w = self.weight_TM[part].log().clamp_min(FLOOR).t()[:, :, None]
            log_t = torch.logsumexp(torch.stack([row.log_CV for row in rows[1:]]).add_(log_w), 0).clamp_min_(FLOOR)
            t = log_t.exp() if reads_t else None
        return self.options.kind.terms(rows[0].log_CV, rows[0].weight_CV, log_t, t), rows[0].weight_CV


class _Divergence(torch.autograd.Function):
    """d D / d logit_v = (h_v - s_v sum h) / temperature; see losses/divergences.py."""

    @staticmethod
    def forward(
        ctx: Any,
        student_TV: torch.Tensor,
        options: _Options,
        mask_T: torch.Tensor | None,
        weight_TM: torch.Tensor | None,
        *teachers_TV: torch.Tensor,
    ) -> torch.Tensor:
        models = _Models(student_TV, teachers_TV, weight_TM, options)
        tokens, group, cut = len(student_TV), options.group, options.block_tokens
        peak_DT, log_total_DT = student_TV.new_zeros(2, models.distributions, tokens, dtype=models.dtype).unbind()
        sums_2T = student_TV.new_zeros(2, tokens, dtype=models.dtype)
        # Filled on the device: a copy from the host would wait for all that it still has to do.
        shape = (models.distributions, 1)
        temperature_D1 = student_TV.new_full(shape, options.teacher_temperature, dtype=models.dtype)
        temperature_D1[0].fill_(options.temperature)
        # Before each collective: all blocks, so that there are few; or one, while it is in cache.
        one_by_one = options.reuse_logits or not is_sharded(group)
        for span in blocks(student_TV, cut) if one_by_one else [slice(0, tokens)]:
            for part in blocks(student_TV, cut, span):
                rows = models.begin(part)
                peak_DT[:, part] = torch.stack([row.peak_C for row in rows])
                log_total_DT[:, part] = torch.stack([row.weight_CV.sum(-1) for row in rows])
            peak, totals = combine(peak_DT[:, span], log_total_DT[None, :, span], temperature_D1, group)
            peak_DT[:, span], log_total_DT[:, span] = peak, totals[0].log()
            for part in blocks(student_TV, cut, span):
                terms, s_CV = models.finish(part, rows if one_by_one else models.begin(part), peak_DT, log_total_DT)
                sums_2T[:, part] = torch.stack((terms.value_C, terms.inner_C))
            sums = sums_2T[:, span].contiguous()
            all_reduce(sums, dist.ReduceOp.SUM, group)
            sums_2T[:, span] = sums
            if options.reuse_logits and ctx.needs_input_grad[0]:
                student_TV[span] = terms.h_CV.addcmul_(s_CV, sums[1][:, None], value=-1)
        value_T, inner_T = sums_2T.unbind()
        ctx.options = options
        if options.reuse_logits:
            ctx.save_for_backward(student_TV, mask_T)
        else:
            ctx.save_for_backward(student_TV, mask_T, weight_TM, peak_DT, log_total_DT, inner_T, *teachers_TV)
        value_T = value_T.clamp_min(0)  # rounding can leave equal distributions just below
        return value_T if mask_T is None else value_T.masked_fill(~mask_T, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple:
        student_TV, mask_T, *rest = ctx.saved_tensors
        options, nothing = ctx.options, (None,) * (len(ctx.needs_input_grad) - 1)
        scale_T = grad_T / options.temperature
        if options.reuse_logits:
            grad_TV = student_TV.mul_(scale_T[:, None])
            return (grad_TV if mask_T is None else grad_TV.masked_fill_(~mask_T[:, None], 0), *nothing)
        weight_TM, peak_DT, log_total_DT, inner_T, *teachers_TV = rest
        models = _Models(student_TV, tuple(teachers_TV), weight_TM, options)
        grad_TV = torch.empty_like(student_TV)
        for part in blocks(student_TV, options.block_tokens):
            terms, s_CV = models.finish(part, models.begin(part), peak_DT, log_total_DT)
            grad_CV = terms.h_CV.addcmul_(s_CV, inner_T[part, None], value=-1).mul_(scale_T[part, None])
            if mask_T is not None:
                grad_CV.masked_fill_(~mask_T[part, None], 0)
            grad_TV[part] = grad_CV
        return grad_TV, *nothing
