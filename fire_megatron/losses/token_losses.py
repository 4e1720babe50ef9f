"""The estimators as losses on chunks of logits, to be fused with the output layer (``losses/fused.py``).

Shapes: N response tokens of a micro-batch, C tokens of a chunk, V vocabulary entries of this shard, M teachers of a
mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fire_megatron.losses.divergences import Divergence
from fire_megatron.losses.estimators import SampledLoss
from fire_megatron.losses.fused import OutputLayer, TokenLoss
from fire_megatron.losses.reduction import token_mean
from fire_megatron.losses.softmax import default_block
from fire_megatron.losses.topk import TopK, topk_divergence
from fire_megatron.losses.vocab_divergence import divergence
from fire_megatron.losses.vocab_parallel import log_prob_and_entropy

SAMPLED_REPORT = ("loss", "loss/clip_fraction", "loss/approx_kl", "rollout/importance_mean", "rollout/importance_cut")
DIVERGENCE_REPORT = ("loss", "loss/divergence")
"""Metrics whose per-token values a loss reports, in order."""


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary."""

    group: dist.ProcessGroup | None
    """The ranks that hold the other parts; None when there are none."""
    vocab_start: int
    """Vocabulary id of the first column."""
    width: int
    """Columns of every rank's part, padding included: what the ranks cut alike by."""


@dataclass(frozen=True)
class DivergenceSettings:
    """What is compared, and how."""

    divergence: Divergence
    temperature: float = 1.0
    """The student's."""
    teacher_temperature: float = 1.0
    mixture: str = "distributions"
    """What the weights of several teachers mix: ``distributions`` or ``log_probs``."""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens that learn from the same teachers."""

    layers: Sequence[OutputLayer]
    """M output layers, each this rank's shard of the vocabulary."""
    hidden: Sequence[torch.Tensor]
    """M times [N of the segment, hidden size of the teacher]."""
    weight_NM: torch.Tensor
    """Weight of each teacher at each token."""

    def __len__(self) -> int:
        return len(self.weight_NM)


def _slice(segments: Sequence[Segment], part: slice) -> tuple[Segment, slice]:
    """The segment that a chunk lies in, and where in it."""
    first = 0
    for segment in segments:
        if part.start < first + len(segment):
            return segment, slice(part.start - first, part.stop - first)
        first += len(segment)
    raise AssertionError((part, [len(segment) for segment in segments]))


def sampled_loss(
    target_N: torch.Tensor, estimate: Callable[[torch.Tensor, slice], SampledLoss], *, shard: VocabShard, tokens: float
) -> TokenLoss:
    """``estimator: sampled``: a loss of the sampled tokens' log-probabilities. Reports :data:`SAMPLED_REPORT`.

    Args:
        target_N: [N] int64 sampled tokens.
        estimate: ``(log_prob_C, which tokens) -> SampledLoss``.
        shard: this rank's part of the vocabulary.
        tokens: response tokens of the whole update: the loss's denominator.
    """

    def token_loss(logits_CV: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        log_prob_C, _ = log_prob_and_entropy(
            logits_CV,
            target_N[part],
            group=shard.group,
            vocab_start=shard.vocab_start,
            with_entropy=False,
            reuse_logits=True,
        )
        result = estimate(log_prob_C, part)
        columns = (result.loss, result.clipped, result.approx_kl, result.importance, result.corrected)
        report_RC = torch.stack([column.detach().to(log_prob_C.dtype) for column in columns])
        return token_mean(result.loss, tokens), report_RC

    return token_loss


def full_loss(
    segments: Sequence[Segment],
    weight_N: torch.Tensor,
    settings: DivergenceSettings,
    *,
    shard: VocabShard,
    tokens: float,
) -> TokenLoss:
    """``estimator: full``: the exact divergence from the teachers, whose logits are formed chunk by chunk. Reports
    :data:`DIVERGENCE_REPORT`.

    Args:
        segments: the tokens by teacher, in order; chunks must not cross their borders.
        weight_N: [N] FiRe's token weights.
        settings: see there.
        shard: this rank's part of the vocabulary, of student and teachers alike.
        tokens: response tokens of the whole update: the loss's denominator.
    """

    def token_loss(logits_CV: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        if part.start == part.stop:
            return _weighted(logits_CV.sum(-1), weight_N[part], tokens)
        segment, within = _slice(segments, part)
        value_C = divergence(
            logits_CV,
            [layer.logits(hidden[within]) for layer, hidden in zip(segment.layers, segment.hidden, strict=True)],
            kind=settings.divergence,
            group=shard.group,
            weight_TM=segment.weight_NM[within],
            mixture=settings.mixture,
            temperature=settings.temperature,
            teacher_temperature=settings.teacher_temperature,
            block_tokens=default_block(shard.width, logits_CV.device),
            reuse_logits=True,
        )
        return _weighted(value_C, weight_N[part], tokens)

    return token_loss


def topk_loss(
    teacher: TopK, weight_N: torch.Tensor, settings: DivergenceSettings, *, shard: VocabShard, tokens: float
) -> TokenLoss:
    """``estimator: topk``: the divergence on the teacher's top-k and a bucket for the rest. Reports
    :data:`DIVERGENCE_REPORT`.

    Args:
        teacher: [N, K] of the tokens' own teachers, with their temperature applied.
        weight_N, settings, shard, tokens: see :func:`full_loss`.
    """

    def token_loss(logits_CV: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        value_C = topk_divergence(
            logits_CV,
            teacher[part],
            kind=settings.divergence,
            group=shard.group,
            vocab_start=shard.vocab_start,
            temperature=settings.temperature,
            reuse_logits=True,
        )
        return _weighted(value_C, weight_N[part], tokens)

    return token_loss


def _weighted(value_C: torch.Tensor, weight_C: torch.Tensor, tokens: float) -> tuple[torch.Tensor, torch.Tensor]:
    loss_C = value_C * weight_C
    return token_mean(loss_C, tokens), torch.stack((loss_C, value_C)).detach()
