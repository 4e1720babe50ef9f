"""Filter: drop the trajectories that their teacher finds least likely (FiRe-OPD, arXiv 2606.02684)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fire_megatron.config.schema import FilterOptions
from fire_megatron.fire.batch import FireBatch, Reducer, Selection
from fire_megatron.metrics.values import Last, Value


def trajectory_scores(batch: FireBatch) -> torch.Tensor:
    """[B] float32: mean over response tokens of the teacher's log-probability; 0 for an empty response."""
    mask = batch.mask_BR
    total = torch.where(mask, batch.teacher_logp_BR, 0.0).sum(-1)
    return total / mask.sum(-1).clamp_min(1)


def group_thresholds(
    scores_B: torch.Tensor, group_B: torch.Tensor, candidate_B: torch.Tensor, groups: int, percentile: float, reducer: Reducer
) -> list[float | None]:
    """The percentile of each group's scores over all ranks, by linear interpolation; None for an empty group.

    Scores are gathered rather than histogrammed, so the threshold is exact, and sorted before they are
    interpolated, so every rank and every layout computes the same number.
    """
    scores = reducer.gather(scores_B[candidate_B])
    labels = reducer.gather(group_B[candidate_B])
    thresholds: list[float | None] = []
    for group in range(groups):
        members = scores[labels == group].double().sort().values
        thresholds.append(float(members.quantile(percentile / 100.0)) if len(members) else None)
    return thresholds


def filter_trajectories(options: FilterOptions) -> Callable[[FireBatch, Selection, Reducer], Selection]:
    """A hook that drops rows scoring below the percentile of their group (rows at the threshold stay).

    Only rows that are still kept set the threshold. Collectives: two ragged gathers of one number a row.
    """

    def hook(batch: FireBatch, selection: Selection, reducer: Reducer) -> Selection:
        if options.drop_truncated:
            selection = selection.drop(batch.truncated_B, "truncated")
        group_B, names = batch.groups(options.group_by)
        scores_B = trajectory_scores(batch)
        thresholds = group_thresholds(scores_B, group_B, selection.keep_B, len(names), options.percentile, reducer)
        # In the scores' own precision: the threshold may be one of them, and that one stays.
        limits = torch.tensor(
            [float("-inf") if t is None else t for t in thresholds], dtype=torch.float64, device=scores_B.device
        ).to(scores_B.dtype)
        metrics: dict[str, Value] = {
            f"fire/threshold/{name}": Last(t) for name, t in zip(names, thresholds, strict=True) if t is not None
        }
        return selection.drop(scores_B < limits[group_B], "below_threshold").report(metrics)

    hook.scope = options.scope  # type: ignore[attr-defined]
    return hook
