"""Reweight: tokens count more where the teacher is sure and the student is not (FiRe-OPD, arXiv 2606.02684)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fire_megatron.config.schema import ReweightOptions
from fire_megatron.fire.batch import FireBatch, Reducer, Selection
from fire_megatron.metrics.values import Max, Mean, Min, Value


def _relative_entropy(
    entropy_BR: torch.Tensor, mask_BR: torch.Tensor, group_B: torch.Tensor, groups: int, reducer: Reducer
) -> torch.Tensor:
    """[B, R] entropy over the largest of its group on any rank, in [0, 1]; 0 where that largest is 0."""
    row_max = torch.where(mask_BR, entropy_BR, 0.0).amax(-1) if entropy_BR.numel() else entropy_BR.new_zeros(len(group_B))
    largest = entropy_BR.new_zeros(groups).scatter_reduce(0, group_B, row_max, "amax")
    largest = reducer.max(largest)[group_B][:, None]
    return torch.where(largest > 0, entropy_BR / largest.clamp_min(torch.finfo(largest.dtype).tiny), 0.0).clamp(0, 1)


def reweight_tokens(options: ReweightOptions) -> Callable[[FireBatch, Selection, Reducer], Selection]:
    """A hook that multiplies token weights by (1 + alpha confidence)(1 + beta confusion) and scales them to mean 1.

    confidence = 1 - H_T / max H_T, confusion = H_S / max H_S; the maxima are over all response tokens of the
    group in the global batch, the mean over those of kept rows (``normalise_over: all``: of all rows, as
    published). Collectives: two maxima of one number a group, one sum of two numbers.
    """

    def hook(batch: FireBatch, selection: Selection, reducer: Reducer) -> Selection:
        group_B, names = batch.groups(options.group_by)
        mask = batch.mask_BR
        confidence = 1.0 - _relative_entropy(batch.teacher_entropy_BR, mask, group_B, len(names), reducer)
        confusion = _relative_entropy(batch.student_entropy_BR, mask, group_B, len(names), reducer)
        weight = selection.weight_BR * (1.0 + options.alpha * confidence) * (1.0 + options.beta * confusion)
        kept = mask & selection.keep_B[:, None]
        counted = kept if options.normalise_over == "kept" else mask
        # float64: the sum over a large global batch must not depend on how it was split.
        sums = reducer.sum(
            torch.stack((torch.where(counted, weight, 0.0).double().sum(), counted.sum(dtype=torch.float64)))
        )
        if sums[0] > 0:
            weight = (weight.double() * (sums[1] / sums[0])).to(weight.dtype)
        metrics = _report(weight, confidence, confusion, kept)
        return type(selection)(selection.keep_B, weight, selection.reasons, selection.metrics | metrics)

    hook.scope = options.scope  # type: ignore[attr-defined]
    return hook


def _report(
    weight: torch.Tensor, confidence: torch.Tensor, confusion: torch.Tensor, kept: torch.Tensor
) -> dict[str, Value]:
    tokens = int(kept.sum())
    if not tokens:
        return {}
    weights = weight[kept]
    return {
        "fire/token_weight_mean": Mean(float(weights.double().sum()), tokens),
        "fire/token_weight_min": Min(float(weights.min())),
        "fire/token_weight_max": Max(float(weights.max())),
        "fire/confidence": Mean(float(confidence[kept].double().sum()), tokens),
        "fire/confusion": Mean(float(confusion[kept].double().sum()), tokens),
    }
