"""Reweight: tokens count more where the teacher is sure and the student is not (FiRe-OPD, arXiv 2606.02684).

Shapes: B rows of this rank, R longest response, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fire_megatron.config.loss import ReweightOptions
from fire_megatron.fire.batch import FireBatch, Selection
from fire_megatron.fire.statistics import exact_sum, group_maxima
from fire_megatron.metrics.values import Mean
from fire_megatron.parallel.reducer import Reducer


def relative_entropy(entropy_BR: torch.Tensor, largest_B: torch.Tensor) -> torch.Tensor:
    """[B, R] float32: entropy over the largest of the row's group, in [0, 1]; 0 where that largest is 0."""
    largest_B1 = largest_B[:, None]
    return torch.where(largest_B1 > 0, entropy_BR / torch.where(largest_B1 > 0, largest_B1, 1), 0).clamp(0, 1)


@dataclass(frozen=True)
class Reweight:
    """Hook that multiplies token weights by (1 + alpha confidence)(1 + beta confusion) and scales them to mean 1.

    confidence = 1 - H_T / max H_T and confusion = H_S / max H_S. The maxima are over the response tokens of the
    group's rows in the whole batch, dropped or not, so they do not depend on the order of the hooks. The mean is over
    the response tokens of the rows kept so far, or (``normalise_over: all``, as published) of all rows: a filter
    that comes later moves the mean of what remains off 1.

    Collectives: one max of two numbers a group and one sum of two numbers.
    """

    options: ReweightOptions

    @property
    def scope(self) -> str:
        """See ReweightOptions."""
        return self.options.scope

    def __call__(self, batch: FireBatch, selection: Selection, reducer: Reducer) -> Selection:
        """Apply. Reports ``fire/confidence`` and ``fire/confusion``, means over the tokens of the rows kept so far; of
        each token its ``confidence`` and ``confusion``."""
        options, mask_BR = self.options, batch.mask_BR
        group_B, names = batch.groups(options.group_by)
        maxima_2G = torch.stack(
            [
                group_maxima(entropy_BR, mask_BR, group_B, groups=len(names))
                for entropy_BR in (batch.teacher_entropy_BR, batch.student_entropy_BR)
            ]
        )
        teacher_B, student_B = reducer.max(maxima_2G)[:, group_B]
        confidence_BR = 1 - relative_entropy(batch.teacher_entropy_BR, teacher_B)
        confusion_BR = relative_entropy(batch.student_entropy_BR, student_B)
        weight_BR = selection.weight_BR * (1 + options.alpha * confidence_BR) * (1 + options.beta * confusion_BR)
        kept_BR = mask_BR & selection.keep_B[:, None]
        counted_BR = kept_BR if options.normalise_over == "kept" else mask_BR
        total, tokens = reducer.sum(
            torch.stack((exact_sum(torch.where(counted_BR, weight_BR, 0)), counted_BR.sum(dtype=torch.float64)))
        )
        # Without any token, or with earlier weights of 0, there is no mean to divide by.
        mean = torch.where(total > 0, total / tokens, 1)
        kept_tokens = float(kept_BR.sum())
        return selection.reweight(weight_BR / mean).report(
            {
                "fire/confidence": Mean(float(confidence_BR[kept_BR].double().sum()), kept_tokens),
                "fire/confusion": Mean(float(confusion_BR[kept_BR].double().sum()), kept_tokens),
            },
            confidence=confidence_BR,
            confusion=confusion_BR,
        )
