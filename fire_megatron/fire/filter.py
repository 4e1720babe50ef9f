"""Filter: drop the trajectories that their teacher finds least likely (FiRe-OPD, arXiv 2606.02684).

Shapes: B rows of this rank, R longest response.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fire_megatron.config.loss import FilterOptions
from fire_megatron.fire.batch import FireBatch, Selection
from fire_megatron.fire.statistics import group_percentiles, row_means
from fire_megatron.metrics.values import Last, Mean, Value
from fire_megatron.parallel.reducer import Reducer


@dataclass(frozen=True)
class Filter:
    """Hook that drops rows scoring below the percentile of their group; a row at the threshold stays.

    A row's score is the mean of its teacher's log-probability over the response tokens. Only rows that no earlier
    hook has dropped (and, with ``drop_truncated``, that are not truncated) set the threshold.

    Collective: one ragged gather of two numbers a row.
    """

    options: FilterOptions
    reasons = ("truncated", "below_threshold")
    """Why this hook drops rows."""

    @property
    def scope(self) -> str:
        """See FilterOptions."""
        return self.options.scope

    def __call__(self, batch: FireBatch, selection: Selection, reducer: Reducer) -> Selection:
        """Apply. Reports ``fire/threshold/<teacher>``, or ``fire/threshold/all`` with ``group_by: batch``; of each row
        its group's ``threshold``."""
        if self.options.drop_truncated:
            selection = selection.drop(batch.truncated_B, "truncated")
        group_B, names = batch.groups(self.options.group_by)
        score_B, keep_B = row_means(batch.teacher_logp_BR, batch.mask_BR), selection.keep_B
        thresholds = group_percentiles(
            score_B[keep_B], group_B[keep_B], groups=len(names), q=self.options.percentile, reducer=reducer
        )
        limits = [float("-inf") if t is None else t for t in thresholds]
        limit_B = torch.tensor(limits, dtype=torch.float64, device=score_B.device)[group_B]
        metrics: dict[str, Value] = {
            # Over the whole batch every rank knows the one threshold; micro-batches have one each.
            f"fire/threshold/{name}": Last(t) if self.scope == "global" else Mean(t, 1)
            for name, t in zip(names, thresholds, strict=True)
            if t is not None
        }
        return selection.drop(score_B < limit_B, "below_threshold").report(metrics, threshold=limit_B)
