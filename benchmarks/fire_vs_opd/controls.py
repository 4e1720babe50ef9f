"""A hook for comparison: it drops as many answers as the filter does, but whichever."""

from __future__ import annotations

import math

import torch

from fire_megatron.fire.batch import FireBatch, Selection
from fire_megatron.fire.hooks import Hook, register_hook
from fire_megatron.parallel.reducer import Reducer


@register_hook("drop_random")
def drop_random(percentile: float = 20.0) -> Hook:
    """Of each teacher's answers, drop the number that lies below a percentile, drawn with the run's seed. One rank."""

    def hook(batch: FireBatch, selection: Selection, reducer: Reducer) -> Selection:
        drop_B = torch.zeros_like(selection.keep_B)
        for teacher in range(len(batch.teacher_names)):
            rows = (selection.keep_B & (batch.teacher_B == teacher)).nonzero().flatten()
            below = math.ceil(percentile / 100 * max(len(rows) - 1, 0))
            drop_B[rows[torch.randperm(len(rows))[:below]]] = True
        return selection.drop(drop_B, "random")

    hook.reasons = ("random",)
    return hook
